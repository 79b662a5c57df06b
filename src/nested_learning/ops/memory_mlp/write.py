"""The write of a stack of memories over one chunk, and its backward pass derived by hand.

The closed form of `memory_mlp.chunk` for the delta term on, no momentum and retention towards zero. All
memories have the same keys, so one Gram matrix and one triangular system serve all their W₂. Little is kept
for the backward pass: what products with the keys or the weights give is computed again.

Notation and shapes: see `stack.py`. The inner error at z is e₂ = silu'(z) ∘ t with t = r (g − u ⟨u, g⟩) and
g = W₁ᵀe; "system" is the triangular matrix N of (I + N) U = R, "solved" is U.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nested_learning.ops.memory_mlp.coefficients import Coefficients
from nested_learning.ops.memory_mlp.stack import (
    Hidden,
    Outputs,
    Stack,
    dot,
    hidden,
    second,
    second_mT,
    second_weights,
    slope,
    unit_backward,
)
from nested_learning.ops.triangular import inverse_unit_lower


class Kept(NamedTuple):
    """What the backward pass of a write does not compute again."""

    errors: Outputs
    solved2: Tensor  # [M, N, C, h] U of W₂
    inverses: Tensor  # [1 + M, N, C, C] of the system of the keys, then of each W₁


class Inner(NamedTuple):
    """The inner backward pass at z, from the errors."""

    gate: Tensor  # sigmoid(z)
    slope: Tensor  # silu'(z)
    g: Tensor  # W₁ᵀe
    ug: Tensor  # ⟨u, g⟩ [M, N, C, 1]
    t: Tensor


def _inner(at: Hidden, errors: Outputs, w: Stack) -> Inner:
    g = second_mT(errors, w)
    ug = dot(at.u, g)
    return Inner(*slope(at.z, at.s), g, ug, torch.addcmul(g, at.u, ug, value=-1) * at.r)


def _grams(k: Tensor, u: Tensor) -> Tensor:
    """Products of the keys with one another, then of each memory's hidden vectors `[1 + M, N, C, C]`."""
    return torch.cat([(k @ k.mT)[None], u @ u.mT])


def _solve1(errors: Outputs, answers: Outputs, inverses: Tensor, c: Coefficients) -> Outputs:
    """U of W₁ of every memory."""
    full = len(errors.full)
    return Outputs(
        inverses[1 : 1 + full] @ (c.eta * errors.full + c.start * answers.full),
        inverses[1 + full :] @ (c.eta * errors.rate + c.start * answers.rate),
    )


def _layer(weight: Tensor, keys: Tensor, solved: Tensor, c: Coefficients) -> Tensor:
    """W' = a₀W − (a ∘ U)ᵀK."""
    return c.start_to_end * weight - (c.to_end * solved).mT @ keys


def write(k: Tensor, c: Coefficients, residuals: Outputs, w: Stack) -> tuple[Stack, Kept]:
    """The memories after one chunk.

    Args:
        k: keys `[N, C, d]`, of unit norm.
        c: step sizes and retentions.
        residuals: P k − v̂ of every memory.
        w: the memories at the chunk's start.
    """
    at = hidden(k, w.w2)
    answers = second(at.u, w)
    errors = Outputs(residuals.full + answers.full, residuals.rate + answers.rate)
    inner = _inner(at, errors, w)
    systems = _grams(k, at.u) * c.inside
    inverses = inverse_unit_lower(systems.flatten(0, 1)).view(systems.shape)
    solved2 = inverses[0] @ (c.eta * inner.slope * inner.t + c.start * at.z)
    solved1 = _solve1(errors, answers, inverses, c)
    full = len(w.w1)
    after = Stack(
        _layer(w.w2, k, solved2, c),
        _layer(w.w1, at.u[:full], solved1.full, c),
        _layer(w.gate, at.u[full:], solved1.rate, c),
    )
    return after, Kept(errors, solved2, inverses)


class _Layer(NamedTuple):
    """Gradients of one layer's write; those at the coefficients are summed over memories."""

    weight: Tensor
    keys: Tensor
    rhs: Tensor  # at R of (I + N) U = R
    system: Tensor  # at N (the part above the diagonal means nothing)
    to_end: Tensor
    start_to_end: Tensor


def _layer_backward(
    d_after: Tensor, weight: Tensor, keys: Tensor, solved: Tensor, inverse: Tensor, c: Coefficients
) -> _Layer:
    """Back through W' = a₀W − (a ∘ U)ᵀK and U = (I + N)⁻¹R."""
    d_scaled = keys @ d_after.mT  # minus the gradient at a ∘ U
    d_rhs = -(inverse.mT @ (d_scaled * c.to_end))
    return _Layer(
        d_after * c.start_to_end,
        -((solved * c.to_end) @ d_after),
        d_rhs,
        -(d_rhs @ solved.mT),
        -dot(d_scaled, solved).sum(0),
        (d_after * weight).sum((-1, -2), keepdim=True).sum(0),
    )


def _both(full: Tensor, rate: Tensor) -> Tensor:
    return torch.cat([full, rate])


def write_backward(
    k: Tensor, c: Coefficients, w: Stack, kept: Kept, d_after: Stack
) -> tuple[Tensor, Coefficients, Outputs, Stack]:
    """Gradients at the keys, the coefficients, the residuals and the memories."""
    at = hidden(k, w.w2)
    full = len(w.w1)
    answers, errors = second(at.u, w), kept.errors
    inner = _inner(at, errors, w)
    solved1 = _solve1(errors, answers, kept.inverses, c)
    inverse, inverse_full, inverse_rate = torch.split(kept.inverses, [1, full, len(w.gate)])

    two = _layer_backward(d_after.w2, w.w2, k, kept.solved2, inverse[0], c)
    one = _layer_backward(d_after.w1, w.w1, at.u[:full], solved1.full, inverse_full, c)
    gate = _layer_backward(d_after.gate, w.gate, at.u[full:], solved1.rate, inverse_rate, c)
    d_grams, d_inside = _systems_backward(k, at.u, two.system.sum(0), _both(one.system, gate.system), c)
    d_k = two.keys.sum(0) + d_grams[0] @ k
    d_u = _both(one.keys, gate.keys) + d_grams[1:] @ at.u

    d_t = two.rhs * c.eta * inner.slope
    ud = dot(at.u, d_t)
    d_g = torch.addcmul(d_t, at.u, ud, value=-1) * at.r
    d_errors = Outputs(*_errors_backward(one.rhs, gate.rhs, d_g, w, c))
    d_answers = Outputs(d_errors.full + one.rhs * c.start, d_errors.rate + gate.rhs * c.start)
    d_w1, d_gate = _second_backward(errors, d_g, d_answers, at.u)
    d_u = d_u + second_mT(d_answers, w) - (d_t * inner.ug + inner.g * ud) * at.r
    d_s = unit_backward(at.s, at.r, d_u, dot(d_t, inner.g) - ud * inner.ug)
    curve = inner.gate * (1 - inner.gate) * (2 + at.z * (1 - 2 * inner.gate))  # silu''(z)
    d_z = two.rhs * c.start + two.rhs * c.eta * inner.t * curve + d_s * inner.slope

    rhs = two.rhs
    d_eta = dot(rhs, inner.slope * inner.t).sum(0)
    d_start = dot(rhs, at.z).sum(0)
    d_eta = d_eta + dot(one.rhs, errors.full).sum(0) + dot(gate.rhs, errors.rate).sum(0)
    d_start = d_start + dot(one.rhs, answers.full).sum(0) + dot(gate.rhs, answers.rate).sum(0)
    d_c = Coefficients(
        d_eta,
        d_inside,
        d_start,
        two.to_end + one.to_end + gate.to_end,
        two.start_to_end + one.start_to_end + gate.start_to_end,
    )
    d_w = Stack(two.weight + d_z.mT @ k, one.weight + d_w1, gate.weight + d_gate)
    return d_k + (d_z @ w.w2).sum(0), d_c, d_errors, d_w


def _systems_backward(
    k: Tensor, u: Tensor, d_first: Tensor, d_rest: Tensor, c: Coefficients
) -> tuple[Tensor, Tensor]:
    """Back through N = D ∘ KKᵀ of the keys and of each W₁.

    Returns symmetric matrices `[1 + M, N, C, C]` that take keys to their gradients, and the gradient at D.
    """
    d_systems = torch.cat([d_first[None], d_rest])
    d_inside = (d_systems * _grams(k, u)).sum(0)
    d_grams = d_systems * c.inside  # D is strictly lower, so this masks too
    return d_grams + d_grams.mT, d_inside


def _errors_backward(
    d_full: Tensor, d_rate: Tensor, d_g: Tensor, w: Stack, c: Coefficients
) -> tuple[Tensor, Tensor]:
    """Gradients at the errors, from those at R of each W₁ and at g = W₁ᵀe."""
    from_g = second(d_g, w)
    return d_full * c.eta + from_g.full, d_rate * c.eta + from_g.rate


def _second_backward(errors: Outputs, d_g: Tensor, d_answers: Outputs, u: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients at W₁ of g = W₁ᵀe and of the answers W₁u."""
    pairs = zip(second_weights(errors, d_g), second_weights(d_answers, u), strict=True)
    d_w1, d_gate = (a + b for a, b in pairs)
    return d_w1, d_gate
