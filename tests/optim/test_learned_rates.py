import copy

import pytest
import torch
from torch import nn

from nested_learning.optim import LearnedRates


def parameter(*values):
    return nn.Parameter(torch.tensor(values, dtype=torch.float64))


def descend(optimizer, p, curvature, steps):
    """Gradient descent on Σ curvature p² / 2; the loss after every step."""
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (curvature * p.square()).sum() / 2
        loss.backward()
        optimizer.step()
        losses.append(((curvature * p.detach().square()).sum() / 2).item())
    return losses


def test_the_first_three_steps_by_hand():
    """On p²/2 gradients agree with the last update: cos(∇L, Δ) = −1, and the factor grows by 1 + β."""
    p = parameter(1.0)
    optimizer = LearnedRates(torch.optim.SGD([p], lr=0.1), {"a": [p]}, beta=0.5)
    descend(optimizer, p, 1.0, 3)
    expected = (1 - 0.1) * (1 - 0.1 * 1.5) * (1 - 0.1 * 1.5**2)
    assert p.item() == pytest.approx(expected, rel=1e-6)
    assert optimizer.rates["a"].item() == pytest.approx(1.5**2)


def test_the_factor_shrinks_when_steps_overshoot():
    p = parameter(1.0)
    optimizer = LearnedRates(torch.optim.SGD([p], lr=1.5), {"a": [p]}, beta=0.2)
    descend(optimizer, p, 1.0, 2)  # p jumps over the minimum and back
    assert optimizer.rates["a"].item() == pytest.approx(0.8)


@pytest.mark.parametrize("maker", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("lr", [3e-3, 1e-2])
def test_learned_rates_reach_a_lower_loss_than_the_same_fixed_rate(maker, lr):
    curvature = torch.tensor([1.0, 3.0], dtype=torch.float64)
    fixed, learned = parameter(1.0, 2.0), parameter(1.0, 2.0)
    without = descend(maker([fixed], lr=lr), fixed, curvature, 100)
    optimizer = LearnedRates(maker([learned], lr=lr), {"a": [learned]}, beta=0.05)
    assert descend(optimizer, learned, curvature, 100)[-1] < 0.5 * without[-1]


def test_every_level_finds_its_own_rate():
    """A level whose rate is ten times too small speeds up; one whose steps overshoot slows down."""
    timid, wild = parameter(1.0), parameter(1.0)
    groups = [{"params": [timid], "lr": 0.01}, {"params": [wild], "lr": 1.9}]
    optimizer = LearnedRates(torch.optim.SGD(groups, lr=1.0), {"timid": [timid], "wild": [wild]}, beta=0.1)
    for _ in range(20):
        optimizer.zero_grad()
        (timid.square() / 2 + wild.square() / 2).sum().backward()
        optimizer.step()
    assert optimizer.rates["timid"] > 3 and optimizer.rates["wild"] < 0.7


def test_parameters_outside_of_levels_are_updated_by_the_plain_optimizer():
    inside, outside, plain = parameter(1.0), parameter(1.0), parameter(1.0)
    optimizer = LearnedRates(torch.optim.Adam([inside, outside], lr=0.1), {"a": [inside]}, beta=0.5)
    reference = torch.optim.Adam([plain], lr=0.1)
    for _ in range(5):
        for p in (inside, outside, plain):
            p.grad = p.detach().clone()
        optimizer.step()
        reference.step()
    assert torch.equal(outside, plain) and not torch.equal(inside, plain)


def test_state_goes_round_bit_for_bit():
    def make():
        p = parameter(1.0, -2.0)
        return p, LearnedRates(torch.optim.AdamW([p], lr=0.1), {"a": [p]}, beta=0.3)

    whole, optimizer = make()
    descend(optimizer, whole, 1.0, 9)
    part, optimizer = make()
    descend(optimizer, part, 1.0, 4)
    state = copy.deepcopy(optimizer.state_dict())
    rest, resumed = make()
    rest.data.copy_(part)
    resumed.load_state_dict(state)
    descend(resumed, rest, 1.0, 5)
    assert torch.equal(rest, whole)


@pytest.mark.parametrize("beta", [0.0, 1.0, -0.1])
def test_beta_out_of_range(beta):
    p = parameter(1.0)
    with pytest.raises(ValueError, match=rf"beta must be in \(0, 1\), got {beta}"):
        LearnedRates(torch.optim.SGD([p], lr=0.1), {"a": [p]}, beta)
