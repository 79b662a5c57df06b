"""Read and write of two-layer memories with backward passes derived by hand: the common case, fast.

The same result as `chunk.py` for the delta term on, no momentum and retention towards zero. Several memories
with the same keys are written together: one Gram matrix and one triangular system serve all their W₂. Only
results of matrix products are kept for the backward pass; everything elementwise is computed again.

Notation of the backward pass: `d_x` is the gradient of the outer loss at x; u = σ̂(z) = s r with s = silu(z)
and r = (‖s‖² + 1)^(−1/2); the inner error at z is e₂ = silu'(z) ∘ t with t = r (g − u ⟨u, g⟩) and g = W₁ᵀ e.

Shapes: `M` memories, `N` sequences times heads, `C` tokens, `d` input, `h` hidden and `o` output width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from nested_learning.ops.memory_mlp.chunk import EPS, MLPWeights
from nested_learning.ops.triangular import inverse_unit_lower


class Coefficients(NamedTuple):
    """Step sizes and retentions of a chunk, as the write needs them."""

    eta: Tensor  # [N, C, 1] η_t
    inside: Tensor  # [N, C, C] η_t a_{s→t−1}, strictly lower triangular
    start: Tensor  # [N, C, 1] η_t a_{0→t−1}
    to_end: Tensor  # [N, C, 1] a_{s→C}
    start_to_end: Tensor  # [N, 1, 1] a_{0→C}


def coefficients(eta: Tensor, log_alpha: Tensor) -> Coefficients:
    """Coefficients of one chunk from η and log α `[N, C]`."""
    total = log_alpha.cumsum(-1)
    before = total - log_alpha
    size = total.shape[-1]
    not_past = torch.ones(size, size, dtype=torch.bool, device=eta.device).triu()
    inside = (before[:, :, None] - total[:, None, :]).masked_fill(not_past, -torch.inf).exp()
    end = total[:, -1:]
    return Coefficients(
        eta.unsqueeze(-1),
        inside * eta.unsqueeze(-1),
        (before.exp() * eta).unsqueeze(-1),
        (end - total).exp().unsqueeze(-1),
        end.exp().unsqueeze(-1),
    )


def _unit(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """s, r and u at `z [..., h]`; r is `[..., 1]`."""
    s = F.silu(z)
    r = torch.linalg.vector_norm(s, dim=-1, keepdim=True).square_().add_(EPS).rsqrt_()
    return s, r, s * r


def _slope(z: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """sigmoid(z) and silu'(z) = σ + s (1 − σ)."""
    gate = torch.sigmoid(z)
    return gate, torch.addcmul(gate + s, s, gate, value=-1)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1, keepdim=True)


def _unit_backward(s: Tensor, r: Tensor, d_u: Tensor, d_r: Tensor | float = 0.0) -> Tensor:
    """Gradient at s from the gradients at u = s r, and at r."""
    d_r = _dot(d_u, s) + d_r
    return torch.addcmul(d_u * r, s, d_r * r.pow(3), value=-1)


def _first_layers(x: Tensor, w2: Sequence[Tensor]) -> Tensor:
    """z = W₂ x of every memory `[M, N, C, h]`."""
    z = x.new_empty(len(w2), *x.shape[:2], w2[0].shape[1])
    for m, weight in enumerate(w2):
        torch.bmm(x, weight.mT, out=z[m])
    return z


def _first_layers_backward(d_z: Tensor, x: Tensor, w2: Sequence[Tensor], d_x: Tensor) -> list[Tensor]:
    """Back through z = W₂ x: adds to `d_x`, returns the gradients at W₂."""
    for m, weight in enumerate(w2):
        d_x.baddbmm_(d_z[m], weight)
    return [torch.bmm(d_z[m].mT, x) for m in range(len(w2))]


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        count = len(tensors) // 2
        z = _first_layers(x, tensors[count:])
        ctx.save_for_backward(x, z, *tensors)
        u = _unit(z)[2]
        return tuple(torch.bmm(u[m], weight.mT) for m, weight in enumerate(tensors[:count]))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *d_answers: Tensor) -> tuple[Tensor, ...]:
        x, z, *tensors = ctx.saved_tensors
        count = len(d_answers)
        s, r, u = _unit(z)
        d_w1, d_u = [], torch.empty_like(z)
        for m, d_answer in enumerate(d_answers):
            d_w1.append(torch.bmm(d_answer.mT, u[m]))
            torch.bmm(d_answer, tensors[m], out=d_u[m])
        d_z = _unit_backward(s, r, d_u).mul_(_slope(z, s)[1])
        d_x = torch.zeros_like(x)
        d_w2 = _first_layers_backward(d_z, x, tensors[count:], d_x)
        return (d_x, *d_w1, *d_w2)


def read_all(weights: Sequence[MLPWeights], x: Tensor) -> tuple[Tensor, ...]:
    """W₁ σ̂(W₂ x) of several memories at the same `x [N, C, d]`: `[N, C, o]` each."""
    tensors = [w.w1 for w in weights] + [w.w2 for w in weights]
    answers: tuple[Tensor, ...] = _Read.apply(x, *tensors)  # type: ignore[no-untyped-call]
    return answers


def read(weights: MLPWeights, x: Tensor) -> Tensor:
    """W₁ σ̂(W₂ x): `[N, C, o]` from `x [N, C, d]`."""
    return read_all([weights], x)[0]


class _Kept(NamedTuple):
    """What the forward pass of a write keeps: its inputs, and results of products."""

    z: Tensor  # [M, N, C, h]
    solved2: Tensor  # [M, N, C, h] U of W₂
    inverses: Tensor  # [M + 1, N, C, C] of the system of the keys, then of each W₁
    answers: list[Tensor]  # [N, C, o] each: W₁ u
    errors: list[Tensor]  # [N, C, o] each: e
    solved1: list[Tensor]  # [N, C, o] each: U of W₁


def _grams(k: Tensor, u: Tensor) -> Tensor:
    """Products of the keys with one another, then of each memory's hidden vectors: `[M + 1, N, C, C]`."""
    memories, n, size, width = u.shape
    grams = k.new_empty(memories + 1, n, size, size)
    torch.bmm(k, k.mT, out=grams[0])
    flat = u.view(-1, size, width)
    torch.bmm(flat, flat.mT, out=grams[1:].view(-1, size, size))
    return grams


def _hidden_errors(errors: Sequence[Tensor], w1: Sequence[Tensor], like: Tensor) -> Tensor:
    """g = W₁ᵀ e of every memory `[M, N, C, h]`."""
    g = torch.empty_like(like)
    for m, error in enumerate(errors):
        torch.bmm(error, w1[m], out=g[m])
    return g


def _write_forward(
    k: Tensor, c: Coefficients, residuals: Sequence[Tensor], w1: Sequence[Tensor], w2: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor], _Kept]:
    z = _first_layers(k, w2)
    s, r, u = _unit(z)
    answers = [torch.bmm(u[m], weight.mT) for m, weight in enumerate(w1)]
    errors = [residual + answer for residual, answer in zip(residuals, answers, strict=True)]
    g = _hidden_errors(errors, w1, z)
    e2 = torch.addcmul(g, u, _dot(u, g), value=-1).mul_(r).mul_(_slope(z, s)[1])

    strict = _grams(k, u).mul_(c.inside)
    inverses = inverse_unit_lower(strict.flatten(0, 1)).view(strict.shape)
    rhs2 = e2.mul_(c.eta).addcmul_(z, c.start)
    solved2 = torch.empty_like(z)
    after1, after2, solved1 = [], [], []
    for m in range(len(w2)):
        torch.bmm(inverses[0], rhs2[m], out=solved2[m])
        after2.append((w2[m] * c.start_to_end).baddbmm_((solved2[m] * c.to_end).mT, k, alpha=-1))
        rhs1 = (errors[m] * c.eta).addcmul_(answers[m], c.start)
        solved1.append(torch.bmm(inverses[m + 1], rhs1))
        after1.append((w1[m] * c.start_to_end).baddbmm_((solved1[m] * c.to_end).mT, u[m], alpha=-1))
    return after1, after2, _Kept(z, solved2, inverses, answers, errors, solved1)


class _Gradients:
    """Gradients that several layers of a write add to."""

    def __init__(self, k: Tensor, c: Coefficients) -> None:
        self.k = torch.zeros_like(k)
        self.eta, self.start, self.to_end = (torch.zeros_like(c.eta) for _ in range(3))
        self.inside = torch.zeros_like(c.inside)
        self.start_to_end = torch.zeros_like(c.start_to_end)


def _layer_backward(
    d_after: Tensor,
    weight: Tensor,
    keys: Tensor,
    solved: Tensor,
    inverse: Tensor,
    c: Coefficients,
    into: _Gradients,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Back through W' = a₀W − (a ∘ U)ᵀK and U = (I + N)⁻¹ R.

    Returns the gradients at W (so far), at K (so far), at R, and minus the gradient at N (full matrix).
    """
    d_keys = torch.bmm(solved * c.to_end, d_after).neg_()
    d_scaled = torch.bmm(keys, d_after.mT).neg_()  # at a ∘ U
    into.to_end += _dot(d_scaled, solved)
    into.start_to_end += (d_after * weight).sum((-1, -2), keepdim=True)
    d_rhs = torch.bmm(inverse.mT, d_scaled.mul_(c.to_end))
    return d_after * c.start_to_end, d_keys, d_rhs, torch.bmm(d_rhs, solved.mT)


def _system_backward(minus_d_strict: Tensor, gram: Tensor, c: Coefficients, into: _Gradients) -> Tensor:
    """Back through N = D ∘ KKᵀ; returns the symmetric matrix that takes K to its gradient."""
    into.inside.addcmul_(minus_d_strict, gram, value=-1)
    d_gram = (minus_d_strict * c.inside).neg_()  # D is strictly lower, so this masks too
    return d_gram + d_gram.mT


def _write_backward(
    k: Tensor,
    c: Coefficients,
    w1: Sequence[Tensor],
    w2: Sequence[Tensor],
    kept: _Kept,
    d_after1: Sequence[Tensor],
    d_after2: Sequence[Tensor],
) -> tuple[Tensor, Coefficients, list[Tensor], list[Tensor], list[Tensor]]:
    into = _Gradients(k, c)
    z = kept.z
    s, r, u = _unit(z)
    gate, slope = _slope(z, s)
    grams = _grams(k, u)
    g = _hidden_errors(kept.errors, w1, z)
    ug = _dot(u, g)
    t = torch.addcmul(g, u, ug, value=-1).mul_(r)

    d_rhs2, d_u = torch.empty_like(z), torch.empty_like(z)
    d_w1, d_w2, d_rhs1 = [], [], []
    shared: Tensor | None = None
    for m in range(len(w1)):
        d_w, d_k, d_rhs2[m], minus = _layer_backward(
            d_after2[m], w2[m], k, kept.solved2[m], kept.inverses[0], c, into
        )
        d_w2.append(d_w)
        into.k += d_k
        shared = minus if shared is None else shared.add_(minus)
        d_w, d_u[m], d_rhs, minus = _layer_backward(
            d_after1[m], w1[m], u[m], kept.solved1[m], kept.inverses[m + 1], c, into
        )
        d_w1.append(d_w)
        d_rhs1.append(d_rhs)
        d_u[m].baddbmm_(_system_backward(minus, grams[m + 1], c, into), u[m])
    assert shared is not None
    into.k.baddbmm_(_system_backward(shared, grams[0], c, into), k)

    into.eta += (d_rhs2 * slope).mul_(t).sum((0, -1)).unsqueeze(-1)
    into.start += (d_rhs2 * z).sum((0, -1)).unsqueeze(-1)
    d_z = d_rhs2 * c.start
    d_e2 = d_rhs2.mul_(c.eta)
    d_t = d_e2 * slope
    ud = _dot(u, d_t)
    d_g = torch.addcmul(d_t, u, ud, value=-1).mul_(r)
    curve = torch.addcmul(gate, gate, gate, value=-1).mul_(2 + z * (1 - 2 * gate))  # silu''(z)
    d_z.addcmul_(d_e2.mul_(t), curve)

    d_residuals = []
    for m, weight in enumerate(w1):
        into.eta += _dot(d_rhs1[m], kept.errors[m])
        into.start += _dot(d_rhs1[m], kept.answers[m])
        d_error = torch.baddbmm(d_rhs1[m] * c.eta, d_g[m], weight.mT)
        d_answer = torch.addcmul(d_error, d_rhs1[m], c.start)
        d_w1[m].baddbmm_(kept.errors[m].mT, d_g[m]).baddbmm_(d_answer.mT, u[m])
        d_u[m].baddbmm_(d_answer, weight)
        d_residuals.append(d_error)
    d_u.addcmul_(torch.addcmul(d_t * ug, g, ud), r, value=-1)
    d_z.addcmul_(_unit_backward(s, r, d_u, _dot(d_t, g) - ud * ug), slope)
    for m, d_w in enumerate(_first_layers_backward(d_z, k, w2, into.k)):
        d_w2[m] += d_w
    d_c = Coefficients(into.eta, into.inside, into.start, into.to_end, into.start_to_end)
    return into.k, d_c, d_residuals, d_w1, d_w2


@dataclass
class _Kernels:
    """The two functions of a write, as they run: eager, or compiled."""

    forward: Callable[..., Any] = _write_forward
    backward: Callable[..., Any] = _write_backward


kernels = _Kernels()


def compile_writes() -> None:
    """Run all writes of this process through `torch.compile`: one graph each way, one per set of shapes."""
    kernels.forward = torch.compile(_write_forward, dynamic=False, fullgraph=True)
    kernels.backward = torch.compile(_write_backward, dynamic=False, fullgraph=True)


class _Write(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, k: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        c = Coefficients(*tensors[:5])
        count = len(tensors[5:]) // 3
        residuals, w1, w2 = (tensors[5 + i * count : 5 + (i + 1) * count] for i in range(3))
        after1, after2, kept = kernels.forward(k, c, residuals, w1, w2)
        ctx.count = count
        lists = (*kept.answers, *kept.errors, *kept.solved1)
        ctx.save_for_backward(k, *c, *w1, *w2, kept.z, kept.solved2, kept.inverses, *lists)
        return (*after1, *after2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *d_after: Tensor) -> tuple[Tensor | None, ...]:
        n = ctx.count
        k, *rest = ctx.saved_tensors
        c, rest = Coefficients(*rest[:5]), rest[5:]
        w1, w2, rest = rest[:n], rest[n : 2 * n], rest[2 * n :]
        z, solved2, inverses, *lists = rest
        kept = _Kept(z, solved2, inverses, lists[:n], lists[n : 2 * n], lists[2 * n :])
        d_k, d_c, *d_lists = kernels.backward(k, c, w1, w2, kept, d_after[:n], d_after[n:])
        return (d_k, *d_c, *d_lists[0], *d_lists[1], *d_lists[2])


def write(
    c: Coefficients, k: Tensor, residuals: Sequence[Tensor], weights: Sequence[MLPWeights]
) -> list[MLPWeights]:
    """Weights of several memories after one chunk.

    Args:
        c: step sizes and retentions of the chunk.
        k: keys `[N, C, d]`, of unit norm, shared by all memories.
        residuals: P k − v̂ of each memory `[N, C, o]`.
        weights: of each memory at the chunk's start, all of the same hidden width.
    """
    w1, w2 = [w.w1 for w in weights], [w.w2 for w in weights]
    after = _Write.apply(k, *c, *residuals, *w1, *w2)  # type: ignore[no-untyped-call]
    count = len(weights)
    return [MLPWeights(after[m], after[count + m]) for m in range(count)]
