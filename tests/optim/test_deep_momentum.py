"""Deep momentum against automatic differentiation of its memory, and its plain special case."""

from __future__ import annotations

import math

import pytest
import torch
from tolerances import assert_same
from torch import nn

from nested_learning.ops.newton_schulz import newton_schulz
from nested_learning.optim import DeepMomentum

LR = 0.1
LENGTH = 20 * 5 * 6  # operations in a row: steps, iterations of Newton-Schulz, width


def make(shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return nn.Parameter(torch.randn(*shape, dtype=torch.float64, generator=generator))


def gradients(shape, steps=20):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(*shape, dtype=torch.float64, generator=generator) for _ in range(steps)]


def memory(weights, u):
    bias, w1, w2 = weights
    features = torch.tanh(u @ w2.T) / math.sqrt(len(w2) * len(u))
    return bias + features @ w1.T


def naive(w, grads, hidden, objective, output, decay, inner_lr):
    """Eq. 50 with the memory's gradient by autograd and every weight treated alike."""
    o, i = w.shape
    generator = torch.Generator().manual_seed(0)
    w2 = torch.randn(hidden, i, generator=generator, dtype=torch.float64)
    start = [torch.zeros(o, i, dtype=torch.float64), torch.zeros(i, hidden, dtype=torch.float64), w2]
    weights, w = [t.clone() for t in start], w.detach().clone()
    for g in grads:
        u = g / g.square().sum(1).mean().sqrt()
        weights = [t.detach().requires_grad_() for t in weights]
        answer = memory(weights, u)
        loss = (answer * g).sum() if objective == "dot" else 0.5 * (answer + g).square().sum()
        slopes = torch.autograd.grad(loss, weights)
        weights = [
            t0 + decay * (t.detach() - t0) - inner_lr * s
            for t0, t, s in zip(start, weights, slopes, strict=True)
        ]
        answer = memory(weights, u)
        w += LR * (newton_schulz(answer) if output == "newton_schulz" else answer)
    return w


@pytest.mark.parametrize("output", ["identity", "newton_schulz"])
@pytest.mark.parametrize("objective", ["l2", "dot"])
@pytest.mark.parametrize("shape", [(3, 5), (6, 2)])
def test_equals_autograd_for_20_steps(shape, objective, output):
    p, grads = make(shape), gradients(shape)
    options = {"hidden": 4, "objective": objective, "output": output, "decay": 0.8, "inner_lr": 0.3}
    expected = naive(p, grads, **options)
    optimizer = DeepMomentum([p], lr=LR, **options)
    for g in grads:
        p.grad = g.clone()
        optimizer.step()
    assert_same(p.detach(), expected, LENGTH)
    assert optimizer.state[p]["w1"].norm() > 0.1  # the hidden layer took part
    assert (optimizer.state[p]["w2"] - optimizer.state[p]["w2_initial"]).norm() > 0.01


@pytest.mark.parametrize("shape", [(3, 5), (7,)])
def test_without_hidden_units_it_is_sgd_with_momentum(shape):
    mine, theirs = make(shape), make(shape)
    a = DeepMomentum([mine], lr=LR, decay=0.9, inner_lr=1.0, hidden=0, objective="dot")
    b = torch.optim.SGD([theirs], lr=LR, momentum=0.9)
    for g in gradients(shape):
        mine.grad, theirs.grad = g.clone(), g.clone()
        a.step()
        b.step()
    assert_same(mine, theirs, LENGTH)


def test_a_memory_answers_a_row_with_what_similar_rows_taught_it():
    """Row 1 has no gradient of its own to speak of, but points where row 0 points."""
    p = nn.Parameter(torch.zeros(2, 8, dtype=torch.float64))
    g = torch.zeros(2, 8, dtype=torch.float64)
    g[0, 0], g[1, 0] = 1.0, 1e-3
    results = {}
    for hidden in (0, 64):
        optimizer = DeepMomentum([p], lr=1.0, hidden=hidden, objective="dot")
        with torch.no_grad():
            p.zero_()
        p.grad = g.clone()
        optimizer.step()
        results[hidden] = p.detach()[1, 0].item()
    assert results[0] == pytest.approx(-1e-3)
    assert results[64] < 1.05 * results[0]


def test_bad_options_are_named():
    p = make((2, 2))
    with pytest.raises(ValueError, match=r"deep_momentum\.objective must be one of l2, dot, got 'cosine'"):
        DeepMomentum([p], objective="cosine")
    with pytest.raises(ValueError, match=r"deep_momentum\.inner_lr must be positive, got 0"):
        DeepMomentum([p], inner_lr=0)
    with pytest.raises(ValueError, match=r"deep_momentum\.hidden must be at least 0, got -1"):
        DeepMomentum([p], hidden=-1)
