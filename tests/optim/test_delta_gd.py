"""Delta gradient descent against least squares, and what its hooks see."""

from __future__ import annotations

import copy

import naive_optimizers as naive
import pytest
import torch
from tolerances import assert_same
from torch import nn
from torch.nn import functional as F

from nested_learning.optim import DeltaGradientDescent, GeneralizedGradientDescent
from nested_learning.optim.delta_gd import OBJECTIVES

LR = 0.3


def network(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3, bias=False)).to(dtype)


def data(rows=7, seed=1, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(rows, n, generator=generator, dtype=torch.float64).to(dtype) for n in (4, 3)]
    return made[0], made[1]


def loss_of(model, x, y):
    return 0.5 * (model(x) - y).square().sum(-1).mean()


def backward(model, optimizer, *batches):
    optimizer.zero_grad()
    for x, y in batches:
        (loss_of(model, x, y) / len(batches)).backward()


def caught_by_hand(model, x, y):
    """Inputs and minus the output gradients of both layers, for the loss above, row by row."""
    first, last = model[0], model[2]
    with torch.no_grad():
        z = first(x)
        hidden = torch.tanh(z)
        delta = last(hidden) - y
        back = (delta @ last.weight) * (1 - hidden**2)
    return {first: (x, -back), last: (hidden, -delta)}


@pytest.mark.parametrize("target", ["gradient", "relative"])
def test_equals_the_proximal_minimum_for_20_steps(target):
    model, reference = network(), network()
    optimizer = DeltaGradientDescent(model, lr=LR, target=target)
    for step in range(20):
        x, y = data(seed=step)
        backward(model, optimizer, (x, y))
        optimizer.step()
        bias = caught_by_hand(reference, x, y)[reference[0]][1].mean(0)
        rows = caught_by_hand(reference, x, y)
        with torch.no_grad():
            for layer, (inputs, targets) in rows.items():
                if target == "relative":
                    targets = targets + inputs @ layer.weight.T
                new = naive.proximal(layer.weight.numpy(), inputs.numpy(), targets.numpy(), LR)
                layer.weight.copy_(torch.from_numpy(new))
            reference[0].bias += LR * bias
    assert_same(list(model.parameters()), list(reference.parameters()), length=20 * 7)


@pytest.mark.parametrize("norm", [0.5, 1.0, 3.0])
def test_one_input_has_the_step_of_its_own_norm_and_the_papers_only_at_one(norm):
    x = F.normalize(torch.randn(1, 4, dtype=torch.float64), dim=-1) * norm
    y = torch.randn(1, 3, dtype=torch.float64)
    updated = {}
    for step in ("exact", "paper"):
        layer = nn.Linear(4, 3, bias=False).double()
        nn.init.ones_(layer.weight)
        optimizer = DeltaGradientDescent(layer, lr=LR, step=step)
        backward(layer, optimizer, (x, y))
        optimizer.step()
        updated[step] = layer.weight.detach()
    w, u = torch.ones(3, 4, dtype=torch.float64), y - x.sum()
    rate = LR / (1 + LR * norm**2)
    eye = torch.eye(4, dtype=torch.float64)
    assert_same(updated["exact"], w @ (eye - rate * x.T @ x) + rate * u.T @ x, length=4)
    rate = LR / (1 + LR)
    assert_same(updated["paper"], w @ (eye - rate * x.T @ x) + rate * u.T @ x, length=4)
    assert torch.allclose(updated["paper"], updated["exact"]) == (norm == 1.0)


def test_a_small_step_is_a_gradient_step_and_a_decay_along_the_inputs():
    model, (x, y) = network(), data()
    optimizer = DeltaGradientDescent(model, lr=1e-7)
    before = model[0].weight.detach().clone()
    backward(model, optimizer, (x, y))
    grad = model[0].weight.grad.clone()
    optimizer.step()
    expected = -(grad + before @ (x.T @ x) / len(x))
    torch.testing.assert_close((model[0].weight - before) / 1e-7, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("target", ["gradient", "relative"])
def test_where_training_ends(target):
    """Eq. 56 ends where G = −W S, which is no minimum of the loss; relative targets end at one."""
    torch.manual_seed(0)
    layer = nn.Linear(4, 3, bias=False).double()
    optimizer = DeltaGradientDescent(layer, lr=LR, target=target)
    x, y = data(30)
    for _ in range(300):
        backward(layer, optimizer, (x, y))
        optimizer.step()
    backward(layer, optimizer, (x, y))
    grad, pull = layer.weight.grad, layer.weight.detach() @ (x.T @ x) / len(x)
    at_end = grad + pull if target == "gradient" else grad
    assert at_end.abs().max() < 1e-9
    assert pull.abs().max() > 0.05


def test_two_micro_batches_are_one_batch_and_sums_are_not_means():
    (x, y), whole, parts, summed = data(8), network(), network(), network()
    one = DeltaGradientDescent(whole, lr=LR)
    backward(whole, one, (x, y))
    one.step()
    two = DeltaGradientDescent(parts, lr=LR)
    backward(parts, two, (x[:4], y[:4]), (x[4:], y[4:]))
    two.step()
    three = DeltaGradientDescent(summed, lr=LR / 8, reduction="sum")
    (loss_of(summed, x, y) * 8).backward()
    three.step()
    for other in (parts, summed):
        assert_same(list(other.parameters()), list(whole.parameters()), length=8 * 6)


@pytest.mark.parametrize("make", [DeltaGradientDescent, GeneralizedGradientDescent])
def test_only_training_passes_since_the_last_step_count(make):
    (x, y), clean, busy = data(), network(), network()
    results = []
    for model, extra in ((clean, False), (busy, True)):
        optimizer = make(model, lr=LR)
        if extra:
            loss_of(model, 5 * x, y).backward()  # forgotten by zero_grad
        backward(model, optimizer, (x, y))
        if extra:
            with torch.no_grad():
                model(100 * x)
            model.eval()(100 * x)
        optimizer.step()
        results.append([p.detach() for p in model.parameters()])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_a_layer_that_was_not_seen_is_an_error():
    model, (x, _) = network(), data()
    optimizer = DeltaGradientDescent(model, lr=LR)
    F.linear(x, model[0].weight).sum().backward()
    with pytest.raises(RuntimeError, match=r"no input was caught for a linear weight of shape \(6, 4\)"):
        optimizer.step()


def test_objective_dot_is_gradient_descent():
    mine, theirs, (x, y) = network(), network(), data()
    a = GeneralizedGradientDescent(mine, lr=LR, objective="dot", inner_steps=1)
    b = torch.optim.SGD(theirs.parameters(), lr=LR)
    for model, optimizer in ((mine, a), (theirs, b)):
        for _ in range(5):
            backward(model, optimizer, (x, y))
            optimizer.step()
    assert_same(list(mine.parameters()), list(theirs.parameters()), length=5 * 7)


def test_objective_l2_ends_at_delta_gradient_descent():
    few, many, delta, (x, y) = network(), network(), network(), data()
    for model, optimizer in (
        (few, GeneralizedGradientDescent(few, lr=LR, objective="l2", inner_steps=1)),
        (many, GeneralizedGradientDescent(many, lr=LR, objective="l2", inner_steps=100)),
        (delta, DeltaGradientDescent(delta, lr=LR)),
    ):
        backward(model, optimizer, (x, y))
        optimizer.step()
    assert_same(list(many.parameters()), list(delta.parameters()), length=100 * 7)
    assert (few[0].weight - delta[0].weight).norm() > 1e-3


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_gradient_of_the_whole_objective_vanishes_at_the_end(objective):
    model, (x, y) = network(), data()
    optimizer = GeneralizedGradientDescent(model, lr=LR, objective=objective, inner_steps=300)
    before = model[0].weight.detach().clone()
    inputs, targets = caught_by_hand(model, x, 5 * y)[model[0]]
    backward(model, optimizer, (x, 5 * y))
    optimizer.step()
    w = model[0].weight.detach().requires_grad_()
    whole = OBJECTIVES[objective](inputs @ w.T, targets).mean() + (w - before).square().sum() / (2 * LR)
    (grad,) = torch.autograd.grad(whole, w)
    assert grad.abs().max() < 1e-9
    assert (w - before).norm() > 0.01


def test_copies_of_model_and_optimizer_go_on_alone():
    model, (x, y) = network(), data()
    optimizer = DeltaGradientDescent(model, lr=LR)
    backward(model, optimizer, (x, y))
    optimizer.step()
    copied_model, copied = copy.deepcopy((model, optimizer))
    backward(copied_model, copied, (x, y))
    assert copied.caught[copied_model[0].weight].rows == len(x)
    assert optimizer.caught[model[0].weight].rows == 0
    copied.step()
    assert not torch.equal(copied_model[0].weight, model[0].weight)
    backward(model, optimizer, (x, y))
    optimizer.step()
    assert torch.equal(copied_model[0].weight, model[0].weight)


def test_bad_options_are_named():
    with pytest.raises(ValueError, match=r"dgd\.step must be one of exact, paper, got 'approximate'"):
        DeltaGradientDescent(network(), step="approximate")
    with pytest.raises(ValueError, match="objective must be one of dot, l2, huber, got 'l1'"):
        GeneralizedGradientDescent(network(), objective="l1")
    with pytest.raises(ValueError, match="inner_steps must be at least 1, got 0"):
        GeneralizedGradientDescent(network(), inner_steps=0)
