"""Statements of docs/errata.md about optimizers that no other test shows."""

from __future__ import annotations

import pytest
import torch
from tolerances import assert_same
from torch import nn

from nested_learning.ops.newton_schulz import newton_schulz
from nested_learning.optim import M3


def test_how_many_gradients_hold_half_and_all_but_a_hundredth_of_a_momentum():
    """β = 0.9: the share of the last n gradients is 1 − βⁿ. The paper has 6 and 43."""
    share = [1 - 0.9**n for n in range(100)]
    assert share[6] < 0.5 <= share[7]
    assert share[43] < 0.99 <= share[44]


def test_the_cubic_iteration_is_a_gradient_step_on_both_terms_together():
    """A quarter of the gradient of ½‖O − g‖² + ½‖OᵀO − I‖² at O = g; Eq. 43 has the second term only."""
    g = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    g /= g.norm()

    def step(objective):
        o = g.clone().requires_grad_()
        (slope,) = torch.autograd.grad(objective(o), o)
        return o.detach() - slope / 4

    def closeness(o):
        return 0.5 * (o - g).square().sum()

    def orthogonality(o):
        return 0.5 * (o.T @ o - torch.eye(3, dtype=torch.float64)).square().sum()

    cubic = newton_schulz(g, steps=1, polynomial="cubic")
    assert_same(step(lambda o: closeness(o) + orthogonality(o)), cubic, length=5)
    away = g + 0.1  # away from g the two terms pull differently: Eq. 44 needs both
    o = away.clone().requires_grad_()
    both, one = (
        torch.autograd.grad(f(o), o)[0] for f in (lambda o: closeness(o) + orthogonality(o), orthogonality)
    )
    assert_same(both - one, away - g, length=5)


def steps_of(scale: float, count: int, **options) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    p = nn.Parameter(torch.zeros(4, 6, dtype=torch.float64))
    optimizer = M3([p], lr=1.0, ns_dtype="param", eps=1e-30, slow_every=2, **options)
    for _ in range(count):
        p.grad = scale * torch.randn(4, 6, dtype=torch.float64, generator=generator)
        optimizer.step()
    return p.detach()


def test_steps_as_printed_shrink_when_gradients_grow_and_adjusted_ones_do_not_notice():
    printed = {"accumulation": "sum", "adjust": "none"}
    small, large = steps_of(1.0, 6, **printed), steps_of(10.0, 6, **printed)
    assert_same(small, 10 * large, length=6 * 5 * 6)
    assert_same(steps_of(1.0, 6), steps_of(10.0, 6), length=6 * 5 * 6)


def test_a_sum_keeps_every_gradient_and_an_average_forgets():
    """Opposite gradients, 20 of each: the sum is back at 0, the average is with the newer ones."""
    for accumulation, sign in (("sum", 0.0), ("ema", 1.0)):
        p = nn.Parameter(torch.zeros(3, 3, dtype=torch.float64))
        optimizer = M3([p], accumulation=accumulation, slow_every=100)
        for step in range(40):
            p.grad = torch.eye(3, dtype=torch.float64) * (-1.0 if step < 20 else 1.0)
            optimizer.step()
        fast = optimizer.state[p]["fast"]
        assert fast.abs().max() < 1e-12 if sign == 0.0 else fast[0, 0] > 0.2


@pytest.mark.parametrize("weight, moves", [(1.0, True), (-1.0, False)])
def test_the_minus_sign_of_eq_75_would_undo_the_step(weight, moves):
    """With a constant gradient both memories point the same way: their difference stands still."""
    p = nn.Parameter(torch.zeros(4, 4, dtype=torch.float64))
    options = {"second_moment": False, "adjust": "none", "ns_dtype": "param"}
    optimizer = M3([p], lr=0.1, slow_weight=weight, slow_every=2, **options)
    gradient = torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for step in range(6):
        before = p.detach().clone()
        p.grad = gradient.clone()
        optimizer.step()
        if step >= 2:  # the slow memory has its first block
            assert bool((p.detach() - before).norm() > 0.1) is moves
