"""Read and write of a two-layer memory whose keys are among its queries: one forward pass for both.

For M(x) = W₁ σ̂(W₂ x) (P = 0), the answers at a chunk's start are what the write differentiates, so a memory
that is written at its own inputs has its predictions for free. The same result as `chunk.py` for the delta
term on, no momentum and retention towards zero; the backward pass is derived by hand as in `write.py`, whose
notation it shares.

Shapes: `N` sequences, `C` keys, `n ≥ C` queries, `d` input, `h` hidden and `o` output width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from nested_learning.ops.memory_mlp.chunk import MLPWeights
from nested_learning.ops.memory_mlp.coefficients import Coefficients
from nested_learning.ops.memory_mlp.stack import dot, slope, unit, unit_backward
from nested_learning.ops.triangular import inverse_unit_lower


class _Kept(NamedTuple):
    """What the backward pass needs besides its inputs: results of products."""

    z: Tensor  # [N, n, h]
    answers: Tensor  # [N, n, o]
    error: Tensor  # [N, C, o]
    g: Tensor  # [N, C, h] W₁ᵀ e
    grams: Tensor  # [2, N, C, C] of the keys, and of the hidden vectors
    inverses: Tensor  # [2, N, C, C] of the systems of W₂ and of W₁
    solved1: Tensor  # [N, C, o] U of W₁
    solved2: Tensor  # [N, C, h] U of W₂


def _forward(x: Tensor, v: Tensor, w1: Tensor, w2: Tensor, c: Coefficients) -> tuple[Tensor, Tensor, _Kept]:
    """W₁ and W₂ after the chunk; the answers are kept."""
    size = v.shape[1]
    z = torch.bmm(x, w2.mT)
    s, r, u = unit(z)
    answers = torch.bmm(u, w1.mT)
    key, z_key, s, r, u, answer = (t[:, :size] for t in (x, z, s, r, u, answers))
    error = answer - v
    g = torch.bmm(error, w1)
    grams = torch.stack([torch.bmm(key, key.mT), torch.bmm(u, u.mT)])
    inverses = inverse_unit_lower((grams * c.inside).flatten(0, 1)).view(grams.shape)
    rhs2 = torch.addcmul(g, u, dot(u, g), value=-1).mul_(r).mul_(slope(z_key, s)[1])
    solved2 = torch.bmm(inverses[0], rhs2.mul_(c.eta).addcmul_(z_key, c.start))
    solved1 = torch.bmm(inverses[1], (error * c.eta).addcmul_(answer, c.start))
    after2 = (w2 * c.start_to_end).baddbmm_((solved2 * c.to_end).mT, key, alpha=-1)
    after1 = (w1 * c.start_to_end).baddbmm_((solved1 * c.to_end).mT, u, alpha=-1)
    return after1, after2, _Kept(z, answers, error, g, grams, inverses, solved1, solved2)


class _LayerGradients(NamedTuple):
    """Gradients of one layer's write: at its weight, keys and right-hand side, and at the coefficients."""

    weight: Tensor
    keys: Tensor
    rhs: Tensor
    inside: Tensor
    to_end: Tensor
    start_to_end: Tensor


def _layer_backward(
    d_after: Tensor,
    weight: Tensor,
    keys: Tensor,
    solved: Tensor,
    system: tuple[Tensor, Tensor],
    c: Coefficients,
) -> _LayerGradients:
    """Back through W' = a₀W − (a ∘ U)ᵀK and U = (I + D ∘ KKᵀ)⁻¹ R; `system` is KKᵀ and the inverse."""
    gram, inverse = system
    scaled = torch.bmm(keys, d_after.mT)  # minus the gradient at a ∘ U
    to_end = dot(scaled, solved).neg_()
    along = torch.linalg.vecdot(d_after.flatten(1), weight.flatten(1))[:, None, None]
    d_rhs = torch.bmm(inverse.mT, scaled.mul_(c.to_end)).neg_()
    d_strict = torch.bmm(d_rhs, solved.mT).neg_()
    d_gram = d_strict * c.inside
    d_keys = torch.bmm(d_gram + d_gram.mT, keys).baddbmm_(solved * c.to_end, d_after, alpha=-1)
    return _LayerGradients(d_after * c.start_to_end, d_keys, d_rhs, d_strict * gram, to_end, along)


def _read_backward(
    x: Tensor, w1: Tensor, w2: Tensor, z: Tensor, d_answers: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients at x, W₁ and W₂ if nothing after the chunk has one."""
    s, r, u = unit(z)
    d_z = unit_backward(s, r, torch.bmm(d_answers, w1)).mul_(slope(z, s)[1])
    return torch.bmm(d_z, w2), torch.bmm(d_answers.mT, u), torch.bmm(d_z.mT, x)


def _backward(
    tensors: tuple[Tensor, Tensor, Tensor],
    c: Coefficients,
    kept: _Kept,
    d_answers: Tensor,
    d_after: MLPWeights,
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Coefficients]:
    """Gradients at x, v, W₁ and W₂, and at the coefficients. `tensors` are x, W₁ and W₂."""
    x, w1, w2 = tensors
    size, error, g = kept.error.shape[1], kept.error, kept.g
    s_all, r_all, u_all = unit(kept.z)
    gate, slope_all = slope(kept.z, s_all)
    key, z, u, r, slope_key = (t[:, :size] for t in (x, kept.z, u_all, r_all, slope_all))
    gate, answer = gate[:, :size], kept.answers[:, :size]
    first = _layer_backward(d_after.w1, w1, u, kept.solved1, (kept.grams[1], kept.inverses[1]), c)
    second = _layer_backward(d_after.w2, w2, key, kept.solved2, (kept.grams[0], kept.inverses[0]), c)

    ug = dot(u, g)
    t = torch.addcmul(g, u, ug, value=-1).mul_(r)
    d_t = second.rhs * slope_key
    d_eta = dot(d_t, t) + dot(first.rhs, error)
    d_start = dot(second.rhs, z) + dot(first.rhs, answer)
    d_t.mul_(c.eta)
    ud = dot(u, d_t)
    d_g = torch.addcmul(d_t, u, ud, value=-1).mul_(r)
    curve = torch.addcmul(gate, gate, gate, value=-1).mul_((z * (1 - 2 * gate)).add_(2))  # silu''(z)
    d_z_key = (second.rhs * c.start).addcmul_(t.mul_(curve), second.rhs * c.eta)

    d_error = torch.baddbmm(first.rhs * c.eta, d_g, w1.mT)
    d_answers = d_answers.clone()
    d_answers[:, :size].add_(d_error).addcmul_(first.rhs, c.start)
    d_w1 = first.weight.baddbmm_(error.mT, d_g).baddbmm_(d_answers.mT, u_all)
    d_u = torch.bmm(d_answers, w1)
    d_u[:, :size].add_(first.keys).addcmul_(torch.addcmul(d_t * ug, g, ud), r, value=-1)
    d_r = torch.zeros_like(r_all)
    d_r[:, :size] = dot(d_t, g) - ud * ug
    d_z = unit_backward(s_all, r_all, d_u, d_r).mul_(slope_all)
    d_z[:, :size] += d_z_key
    d_w2 = second.weight.baddbmm_(d_z.mT, x)
    d_x = torch.bmm(d_z, w2)
    d_x[:, :size] += second.keys
    into = (a + b for a, b in zip(first[3:], second[3:], strict=True))
    d_inside, d_to_end, d_start_to_end = into
    return (d_x, d_error.neg_(), d_w1, d_w2), Coefficients(d_eta, d_inside, d_start, d_to_end, d_start_to_end)


class _ReadWrite(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, v: Tensor, w1: Tensor, w2: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        after1, after2, kept = _forward(x, v, w1, w2, Coefficients(*tensors))
        ctx.save_for_backward(x, w1, w2, *tensors, *kept)
        ctx.set_materialize_grads(False)
        return kept.answers, after1, after2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, d_answers: Tensor | None, d_after1: Tensor | None, d_after2: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x, w1, w2, *rest = ctx.saved_tensors
        c, kept = Coefficients(*rest[:5]), _Kept(*rest[5:])
        if d_answers is None:
            d_answers = torch.zeros_like(kept.answers)
        if d_after1 is None and d_after2 is None:  # the last chunk of a sequence: nobody reads its write
            d_x, d_w1, d_w2 = _read_backward(x, w1, w2, kept.z, d_answers)
            return (d_x, None, d_w1, d_w2, *(None,) * len(c))
        d_after = MLPWeights(
            *(torch.zeros_like(w) if d is None else d for d, w in ((d_after1, w1), (d_after2, w2)))
        )
        d_inputs, d_c = _backward((x, w1, w2), c, kept, d_answers, d_after)
        return (*d_inputs, *d_c)


def read_write(c: Coefficients, x: Tensor, v: Tensor, weights: MLPWeights) -> tuple[Tensor, MLPWeights]:
    """Answers W₁σ̂(W₂x) of the chunk's start `[N, n, o]`, and the weights after the chunk.

    Args:
        c: step sizes and retentions of the chunk's C tokens.
        x: inputs `[N, n, d]`, of unit norm; the first C are the keys of the write.
        v: what the memory shall answer to the keys `[N, C, o]`.
        weights: at the chunk's start.
    """
    answers, w1, w2 = _ReadWrite.apply(x, v, *weights, *c)  # type: ignore[no-untyped-call]
    return answers, MLPWeights(w1, w2)
