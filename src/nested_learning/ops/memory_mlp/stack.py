"""Several two-layer memories of every sequence as one stack, and the pieces of their backward pass.

A stack holds F memories of output width o (M_memory and the projections) and then R of width 1 (the rates),
M = F + R, all of one hidden width. `d_x` is the gradient of the outer loss at x; u = σ̂(z) = s r with
s = silu(z) and r = (‖s‖² + 1)^(−1/2).

Shapes: `N` sequences times heads, `C` tokens, `d` input, `h` hidden and `o` output width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from nested_learning.ops.memory_mlp.chunk import EPS


class Stack(NamedTuple):
    """Weights of M memories, or gradients at them."""

    w2: Tensor  # [M, N, h, d] first layers
    w1: Tensor  # [F, N, o, h] second layers of the full memories
    gate: Tensor  # [R, N, 1, h] second layers of the rates


class Outputs(NamedTuple):
    """Outputs of M memories, or gradients at them."""

    full: Tensor  # [F, N, C, o]
    rate: Tensor  # [R, N, C, 1]


def part(w: Stack, first: int, last: int | None = None) -> Stack:
    """The memories from `first` to `last` (all full ones after `first` and all rates, if None)."""
    full = len(w.w1)
    if last is None:
        return Stack(w.w2[first:], w.w1[first:], w.gate[max(0, first - full) :])
    return Stack(w.w2[first:last], w.w1[first:last], w.gate[:0])


def none_of(like: Tensor, width: int) -> Tensor:
    """Outputs `[0, N, C, width]` of no memory at all, for inputs `like [N, C, d]`."""
    return like.new_empty(0, *like.shape[:-1], width)


def unit(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """s, r and u at `z [..., h]`; r is `[..., 1]`."""
    s = F.silu(z)
    r = torch.linalg.vector_norm(s, dim=-1, keepdim=True).square_().add_(EPS).rsqrt_()
    return s, r, s * r


class Hidden(NamedTuple):
    """The hidden layer: z = W₂x and s, r, u of it."""

    z: Tensor  # [M, N, C, h]
    s: Tensor
    r: Tensor  # [M, N, C, 1]
    u: Tensor


def hidden(x: Tensor, w2: Tensor) -> Hidden:
    """u = σ̂(W₂x) and what it is made of; `x` is `[N, C, d]` for all memories or `[M, N, C, d]`."""
    z = x @ w2.mT
    return Hidden(z, *unit(z))


def second(u: Tensor, w: Stack) -> Outputs:
    """W₁u."""
    full = len(w.w1)
    return Outputs(u[:full] @ w.w1.mT, (u[full:] * w.gate).sum(-1, keepdim=True))


def second_mT(e: Outputs, w: Stack) -> Tensor:
    """W₁ᵀe `[M, N, C, h]`."""
    return torch.cat([e.full @ w.w1, e.rate * w.gate])


def second_weights(d: Outputs, u: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients at W₁ of W₁u from those at the outputs: of the full memories, and of the rates."""
    full = len(d.full)
    return d.full.mT @ u[:full], (d.rate * u[full:]).sum(-2, keepdim=True)


def slope(z: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """sigmoid(z) and silu'(z) = σ + s (1 − σ)."""
    gate = torch.sigmoid(z)
    return gate, torch.addcmul(gate + s, s, gate, value=-1)


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner products over the last axis, which stays as 1."""
    return (a * b).sum(-1, keepdim=True)


def unit_backward(s: Tensor, r: Tensor, d_u: Tensor, d_r: Tensor | float = 0.0) -> Tensor:
    """Gradient at s from those at u = s r and at r."""
    return torch.addcmul(d_u * r, s, (dot(d_u, s) + d_r) * r.pow(3), value=-1)


def read(x: Tensor, w: Stack) -> Outputs:
    """W₁σ̂(W₂x) of every memory."""
    return second(hidden(x, w.w2).u, w)


def read_backward(x: Tensor, w: Stack, d: Outputs) -> tuple[Tensor, Stack]:
    """Gradients at `x`, one per memory `[M, N, C, d]`, and at the weights. Computes z again."""
    at = hidden(x, w.w2)
    d_z = unit_backward(at.s, at.r, second_mT(d, w)) * slope(at.z, at.s)[1]
    return d_z @ w.w2, Stack(d_z.mT @ x, *second_weights(d, at.u))


def l2(x: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """y = x r and r = (‖x‖² + eps)^(−1/2) `[..., 1]`."""
    r = (x.square().sum(-1, keepdim=True) + eps).rsqrt()
    return x * r, r


def l2_backward(y: Tensor, r: Tensor, d_y: Tensor) -> Tensor:
    """Gradient at x of y = x r."""
    return (d_y - y * dot(d_y, y)) * r
