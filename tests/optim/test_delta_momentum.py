"""Delta momentum and its relatives against NumPy and against torch."""

from __future__ import annotations

import itertools

import naive_optimizers as naive
import pytest
import torch
from tolerances import assert_same
from torch import nn

from nested_learning.optim import M3, DeltaMomentum
from nested_learning.optim.config import DeltaMomentumConfig

SHAPES = [(3, 5), (5, 3), (4, 4)]
LR = 0.05
LENGTH = 20 * 5 * 5  # operations in a row: steps, iterations of Newton-Schulz, width


def make(shapes=SHAPES, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(*s, dtype=torch.float64, generator=generator)) for s in shapes]


def gradients(steps=20, shapes=SHAPES):
    generator = torch.Generator().manual_seed(1)
    return [[torch.randn(*s, dtype=torch.float64, generator=generator) for s in shapes] for _ in range(steps)]


def run(optimizer, params, grads):
    for step in grads:
        for p, g in zip(params, step, strict=True):
            p.grad = g.clone()
        optimizer.step()


VARIANTS = [
    *(
        {"delta": d, "side": s}
        for d, s in itertools.product(("eta", "normalized", "capped"), ("right", "left"))
    ),
    {"delta": "off", "precondition": "diagonal"},
    {"delta": "off", "features": "signed_square"},
    {"features": "cube", "beta2": 0.9, "precondition": "diagonal"},
    {"features": "tanh", "output": "newton_schulz"},
    {"features": "sign", "output": "sign"},
]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_equals_the_naive_loop_for_20_steps(options):
    params, grads = make(), gradients()
    start = [p.detach().numpy().copy() for p in params]
    run(DeltaMomentum(params, lr=LR, **options), params, grads)
    for i, p in enumerate(params):
        one = [g[i].numpy() for g in grads]
        expected = naive.delta_momentum(start[i], one, LR, DeltaMomentumConfig(**options))
        assert_same(p.detach(), torch.from_numpy(expected), LENGTH)


def test_a_literal_step_equals_the_naive_one():
    params, grads = make(), [[0.1 * g for g in step] for step in gradients(6)]
    start = [p.detach().numpy().copy() for p in params]
    run(DeltaMomentum(params, lr=LR, delta="literal"), params, grads)
    for i, p in enumerate(params):
        one = [g[i].numpy() for g in grads]
        expected = naive.delta_momentum(start[i], one, LR, DeltaMomentumConfig(delta="literal"))
        assert_same(p.detach(), torch.from_numpy(expected), LENGTH)


def test_without_decay_term_it_is_sgd_with_momentum():
    shapes = [(3, 5), (4,), (2, 3, 2)]
    mine, theirs, grads = make(shapes), make(shapes), gradients(20, shapes)
    run(DeltaMomentum(mine, lr=LR, momentum=0.8, delta="off"), mine, grads)
    run(torch.optim.SGD(theirs, lr=LR, momentum=0.8), theirs, grads)
    assert_same(mine, theirs, LENGTH)


def test_with_newton_schulz_it_is_muon():
    mine, theirs, grads = make(), make(), gradients()
    run(DeltaMomentum(mine, lr=LR, delta="off", output="newton_schulz"), mine, grads)
    muon = {"slow_weight": 0.0, "second_moment": False, "adjust": "none", "ns_dtype": "param"}
    run(M3(theirs, lr=LR, betas=(0.9, 0.9, 0.9), **muon), theirs, grads)
    assert_same(mine, theirs, LENGTH)


def test_diagonal_preconditioning_without_momentum_is_rmsprop_with_bias_correction():
    """Which is Adam with β₁ = 0."""
    mine, theirs, grads = make(), make(), gradients()
    options = {"momentum": 0.0, "delta": "off", "precondition": "diagonal", "beta2": 0.9}
    run(DeltaMomentum(mine, lr=LR, **options), mine, grads)
    run(torch.optim.Adam(theirs, lr=LR, betas=(0.0, 0.9)), theirs, grads)
    assert_same(mine, theirs, LENGTH)


def test_a_vector_counts_as_a_row():
    """Its momentum loses what points along the gradient, and nothing else."""
    p = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = DeltaMomentum([p], lr=0.5, momentum=1.0, delta="normalized", beta=1.0)
    for g in ([1.0, 0.0], [1.0, 1.0]):
        p.grad = torch.tensor(g, dtype=torch.float64)
        optimizer.step()
    # m = (-0.5, 0), then (-0.25, 0.25) after forgetting along (1, 1), then minus 0.5 (1, 1)
    expected = torch.tensor([-0.75, -0.25], dtype=torch.float64)
    assert_same(optimizer.state[p]["momentum"], expected, length=2)


def test_a_capped_memory_never_grows_by_forgetting_and_a_literal_one_does():
    for scale in (1e-3, 1.0, 1e3):
        g = torch.tensor([[2.0, 1.0]], dtype=torch.float64) * scale
        norms = {}
        for delta in ("capped", "literal"):
            p = nn.Parameter(torch.zeros(1, 2, dtype=torch.float64))
            optimizer = DeltaMomentum([p], lr=1.0, delta=delta)
            optimizer.state[p] = {"step": 1, "momentum": g.clone()}
            p.grad = g.clone()
            optimizer.param_groups[0]["lr"] = 1.0
            optimizer.step()
            forgotten = optimizer.state[p]["momentum"] + g  # take the write away again
            norms[delta] = forgotten.norm() / g.norm()
        assert norms["capped"] <= 0.9 + 1e-9
        assert norms["literal"] > 1 or scale < 1


def test_bad_options_are_named():
    with pytest.raises(ValueError, match=r"delta_momentum\.delta must be one of off, literal, .*, got 'on'"):
        DeltaMomentum(make(), delta="on")
    with pytest.raises(ValueError, match=r"delta_momentum\.side must be one of right, left, got 'top'"):
        DeltaMomentum(make(), side="top")
    with pytest.raises(ValueError, match=r"delta_momentum\.momentum must be in \[0, 1\], got 2"):
        DeltaMomentum(make(), momentum=2)
    with pytest.raises(TypeError, match="dleta"):
        DeltaMomentum(make(), dleta="off")
