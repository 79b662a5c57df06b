"""What every optimizer must do: converge, repeat itself, save and load, be copied, take bfloat16."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import io
import pydoc

import pytest
import torch
from tolerances import assert_same
from torch import nn
from torch.nn import functional as F

from nested_learning.optim import (
    M3,
    DeepMomentum,
    DeltaGradientDescent,
    DeltaMomentum,
    GeneralizedGradientDescent,
)


def all_parameters(make):
    return lambda model, **options: make(model.parameters(), **options)


# how it is made, and learning rates for the quadratic and for the network
OPTIMIZERS = {
    "m3": (all_parameters(M3), 0.1, 0.02),
    "delta": (all_parameters(DeltaMomentum), 1.0, 0.1),
    "delta_adam": (
        lambda m, **o: DeltaMomentum(m.parameters(), delta="normalized", precondition="diagonal", **o),
        0.02,
        0.02,
    ),
    "deep": (all_parameters(DeepMomentum), 0.3, 0.05),
    "deep_l2": (lambda m, **o: DeepMomentum(m.parameters(), objective="l2", **o), 1.0, 0.3),
    "dgd": (DeltaGradientDescent, 0.02, 0.1),
    "dgd_relative": (lambda m, **o: DeltaGradientDescent(m, target="relative", **o), 0.3, 0.3),
    "ggd": (GeneralizedGradientDescent, 0.02, 0.1),
}
NAMES = list(OPTIMIZERS)
SHRINKING = ("dgd", "ggd")  # they pull W to zero along its inputs, always
INPUT_AWARE = ("dgd", "dgd_relative", "ggd")


def network(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 2)).to(
        dtype
    )


def spirals(dtype=torch.float32):
    """Two classes that no line separates: x [64, 2], y [64]."""
    angle = torch.linspace(0.5, 4.5, 32)
    arm = torch.stack([angle.cos() * angle, angle.sin() * angle], 1) / 2
    return torch.cat([arm, -arm]).to(dtype), torch.arange(64) // 32


def train(model, optimizer, steps):
    x, y = spirals(next(model.parameters()).dtype)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x).float(), y).backward()
        optimizer.step()
    return F.cross_entropy(model(x).float(), y).item()


@pytest.mark.thorough
@pytest.mark.parametrize("name", NAMES)
def test_a_small_network_learns_two_spirals(name):
    make, _, lr = OPTIMIZERS[name]
    model = network()
    start = train(model, make(model, lr=lr), 0)
    end = train(model, make(model, lr=lr), 400)
    limit = 0.55 if name in SHRINKING else 0.1  # the best line through the origin has 0.33
    assert start > 0.64 and end < limit, (start, end)


@pytest.mark.parametrize("name", [n for n in NAMES if n not in INPUT_AWARE])
def test_an_ill_conditioned_quadratic_goes_down(name):
    """½ tr (W − W*)ᵀ H (W − W*) with a condition number of 1,000, from a distance of 1 per entry."""
    make, lr, _ = OPTIMIZERS[name]
    model = nn.Linear(6, 4, bias=False).double()
    nn.init.zeros_(model.weight)
    curvature = torch.logspace(-3, 0, 6, dtype=torch.float64)
    optimizer = make(model, lr=lr)
    losses = []
    for step in range(1500):
        loss = 0.5 * ((model.weight - 1).square() * curvature).sum()
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - step / 1500)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 1e-3 * losses[0], losses[::300]


@pytest.mark.parametrize("name", NAMES)
def test_two_runs_are_the_same_and_a_copy_goes_on_alone(name):
    make, _, lr = OPTIMIZERS[name]
    first, second = network(), network()
    one, two = make(first, lr=lr), make(second, lr=lr)
    train(first, one, 7)
    train(second, two, 7)
    copied, three = copy.deepcopy((first, one))
    train(copied, three, 7)
    for a, b, c in zip(first.parameters(), second.parameters(), copied.parameters(), strict=True):
        assert torch.equal(a, b) and not torch.equal(a, c)
    train(first, one, 7)
    for a, c in zip(first.parameters(), copied.parameters(), strict=True):
        assert torch.equal(a, c)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_a_saved_state_goes_on_bit_for_bit(name, dtype):
    make, _, lr = OPTIMIZERS[name]
    model = network(dtype)
    optimizer = make(model, lr=lr, weight_decay=0.01)
    train(model, optimizer, 21)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(model, optimizer, 20)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = network(dtype)
    other.load_state_dict(saved["model"])
    resumed = make(other, lr=1e-9)
    resumed.load_state_dict(saved["optimizer"])
    train(other, resumed, 20)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_weights_follow_float32_weights(name):
    make, _, lr = OPTIMIZERS[name]
    exact, rounded = network(), network(torch.bfloat16)
    exact.load_state_dict(rounded.state_dict())  # start from the same numbers
    before = [p.detach().clone() for p in exact.parameters()]
    train(exact, make(exact, lr=lr), 5)
    train(rounded, make(rounded, lr=lr), 5)
    moved = sum((a - b).square().sum() for a, b in zip(exact.parameters(), before, strict=True))
    apart = sum(
        (a - b.float()).square().sum() for a, b in zip(exact.parameters(), rounded.parameters(), strict=True)
    )
    assert all(p.dtype == torch.bfloat16 for p in rounded.parameters())
    assert apart < 0.25 * moved, (apart, moved)


@pytest.mark.parametrize("name", NAMES)
def test_closure_decay_and_missing_gradients(name):
    make, _, _ = OPTIMIZERS[name]
    model = nn.Linear(3, 2, bias=False).double()
    before = model.weight.detach().clone()
    optimizer = make(model, lr=0.5, weight_decay=0.2)
    optimizer.step()
    assert torch.equal(model.weight, before)  # no gradient, no step, no decay

    def closure():
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = 0 * model(torch.zeros(1, 3, dtype=torch.float64)).sum() + 7
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 7
    assert_same(model.weight.detach(), 0.9 * before, length=1)


@pytest.mark.parametrize("name", NAMES)
def test_bad_input_is_named(name):
    make, _, _ = OPTIMIZERS[name]
    with pytest.raises(ValueError, match=r"lr must be at least 0 and finite, got -1"):
        make(network(), lr=-1)
    with pytest.raises(ValueError, match=r"weight_decay must be at least 0 and finite, got -0\.1"):
        make(network(), weight_decay=-0.1)
    with pytest.raises(TypeError, match="speed"):
        make(network(), speed=1)
    table = nn.Embedding(3, 2, sparse=True)
    optimizer = make(table)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match=r"sparse gradients are not supported, got one of shape \(3, 2\)"):
        optimizer.step()


@pytest.mark.parametrize("name", NAMES)
def test_a_scheduler_drives_it(name):
    make, _, lr = OPTIMIZERS[name]
    model = network()
    optimizer = make(model, lr=lr)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    before = [p.detach().clone() for p in model.parameters()]
    train(model, optimizer, 1)
    scheduler.step()
    for a, b in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize(
    "kind", [M3, DeltaGradientDescent, GeneralizedGradientDescent, DeltaMomentum, DeepMomentum]
)
def test_help_shows_every_option_with_its_default(kind):
    shown = inspect.signature(kind).parameters
    help_text = pydoc.render_doc(kind, renderer=pydoc.plaintext)
    assert {"lr", "weight_decay"} < shown.keys() and "options" not in shown
    for option in dataclasses.fields(kind.rule):
        assert shown[option.name].default == option.default
        assert f"{option.name}: '{option.type}' = {option.default!r}" in help_text
    with pytest.raises(TypeError, match="beta4"):
        kind(nn.Linear(2, 2) if "model" in shown else [nn.Parameter(torch.zeros(2, 2))], beta4=1)
