"""Read and write of a two-layer memory whose keys are among its queries: one forward pass for both.

For M(x) = W₁ σ̂(W₂ x) (P = 0), the answers at a chunk's start are what the write differentiates, so a memory
that is written at its own inputs has its predictions for free. The same result as `chunk.py` for the delta
term on, no momentum and retention towards zero; the backward pass is derived by hand as in `fused.py`, whose
notation it shares.

Shapes: `N` sequences, `C` keys, `n ≥ C` queries, `d` input, `h` hidden and `o` output width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nested_learning.ops.memory_mlp.chunk import MLPWeights
from nested_learning.ops.memory_mlp.fused import (
    Coefficients,
    _dot,
    _Gradients,
    _layer_backward,
    _slope,
    _system_backward,
    _unit,
    _unit_backward,
)
from nested_learning.ops.triangular import inverse_unit_lower

CURVE_OFFSET = 2  # silu''(z) = σ(1 − σ)(2 + z(1 − 2σ))


def _grams(k: Tensor, u: Tensor) -> Tensor:
    """Products of the keys, and of the hidden vectors, with one another `[2, N, C, C]`."""
    return torch.stack([torch.bmm(k, k.mT), torch.bmm(u, u.mT)])


class _ReadWrite(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor, w1: Tensor, w2: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        c, size = Coefficients(*tensors), residual.shape[1]
        z = torch.bmm(x, w2.mT)
        u_all = _unit(z)[2]
        answers = torch.bmm(u_all, w1.mT)
        k, z_key, answer, u = (t[:, :size] for t in (x, z, answers, u_all))
        s, r, _ = _unit(z_key)
        error = residual + answer
        g = torch.bmm(error, w1)
        e2 = torch.addcmul(g, u, _dot(u, g), value=-1).mul_(r).mul_(_slope(z_key, s)[1])
        strict = _grams(k, u).mul_(c.inside)
        inverses = inverse_unit_lower(strict.flatten(0, 1)).view(strict.shape)
        solved2 = torch.bmm(inverses[0], e2.mul_(c.eta).addcmul_(z_key, c.start))
        solved1 = torch.bmm(inverses[1], (error * c.eta).addcmul_(answer, c.start))
        after2 = (w2 * c.start_to_end).baddbmm_((solved2 * c.to_end).mT, k, alpha=-1)
        after1 = (w1 * c.start_to_end).baddbmm_((solved1 * c.to_end).mT, u, alpha=-1)
        ctx.save_for_backward(x, w1, w2, *c, z, answers, error, g, solved1, solved2, inverses)
        return answers, after1, after2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_answers: Tensor, d_after1: Tensor, d_after2: Tensor) -> tuple[Tensor, ...]:
        x, w1, w2, *rest = ctx.saved_tensors
        c = Coefficients(*rest[:5])
        z_all, answers, error, g, solved1, solved2, inverses = rest[5:]
        size = error.shape[1]
        s_all, r_all, u_all = _unit(z_all)
        gate_all, slope_all = _slope(z_all, s_all)
        every = (x, z_all, u_all, r_all, gate_all, slope_all, answers)
        k, z, u, r, gate, slope, answer = (t[:, :size] for t in every)
        grams = _grams(k, u)
        ug = _dot(u, g)
        t = torch.addcmul(g, u, ug, value=-1).mul_(r)

        into = _Gradients(k, c)
        d_w2, d_k, d_rhs2, minus2 = _layer_backward(d_after2, w2, k, solved2, inverses[0], c, into)
        d_w1, d_u_key, d_rhs1, minus1 = _layer_backward(d_after1, w1, u, solved1, inverses[1], c, into)
        d_k.baddbmm_(_system_backward(minus2, grams[0], c, into), k)
        d_u_key.baddbmm_(_system_backward(minus1, grams[1], c, into), u)

        into.eta += _dot(d_rhs2 * slope, t) + _dot(d_rhs1, error)
        into.start += _dot(d_rhs2, z) + _dot(d_rhs1, answer)
        d_z_key = d_rhs2 * c.start
        d_e2 = d_rhs2.mul_(c.eta)
        d_t = d_e2 * slope
        ud = _dot(u, d_t)
        d_g = torch.addcmul(d_t, u, ud, value=-1).mul_(r)
        curve = torch.addcmul(gate, gate, gate, value=-1).mul_(CURVE_OFFSET + z * (1 - 2 * gate))
        d_z_key.addcmul_(d_e2.mul_(t), curve)

        d_error = torch.baddbmm(d_rhs1 * c.eta, d_g, w1.mT)
        d_answers = d_answers.clone()
        d_answers[:, :size].add_(d_error).addcmul_(d_rhs1, c.start)
        d_w1.baddbmm_(error.mT, d_g).baddbmm_(d_answers.mT, u_all)
        d_u = torch.bmm(d_answers, w1)
        d_u[:, :size].add_(d_u_key).addcmul_(torch.addcmul(d_t * ug, g, ud), r, value=-1)
        d_r = torch.zeros_like(r_all)
        d_r[:, :size] = _dot(d_t, g) - ud * ug
        d_z = _unit_backward(s_all, r_all, d_u, d_r).mul_(slope_all)
        d_z[:, :size] += d_z_key
        d_w2.baddbmm_(d_z.mT, x)
        d_x = torch.bmm(d_z, w2)
        d_x[:, :size] += d_k
        d_c = (into.eta, into.inside, into.start, into.to_end, into.start_to_end)
        return (d_x, d_error, d_w1, d_w2, *d_c)


def read_write(
    c: Coefficients, x: Tensor, residual: Tensor, weights: MLPWeights
) -> tuple[Tensor, MLPWeights]:
    """Answers W₁σ̂(W₂x) of the chunk's start `[N, n, o]`, and the weights after the chunk.

    Args:
        c: step sizes and retentions of the chunk's C tokens.
        x: inputs `[N, n, d]`, of unit norm; the first C are the keys of the write.
        residual: − v̂ `[N, C, o]`: the error but for the answer.
        weights: at the chunk's start.
    """
    answers, w1, w2 = _ReadWrite.apply(x, residual, *weights, *c)  # type: ignore[no-untyped-call]
    return answers, MLPWeights(w1, w2)
