"""Depthwise causal convolution as a sum of shifted products, and unit streams made of it.

Shapes: B batch, T tokens, D channels, W window, H heads, N = B·H, d width of a stream, D = 3·H·d.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

EPS = 1e-6  # inside the root of the norm: keeps value and gradient finite at 0


def shifted_sum(padded: Tensor, weight: Tensor) -> Tensor:
    """y_t = Σ_i weight[:, i] ⊙ padded_{t + i}: `padded [B, W - 1 + T, D]`, `weight [D, W]` to `[B, T, D]`.

    W multiply-adds. F.conv1d(groups=D) took twice as long even under automatic differentiation
    (x [4, 1024, 768], W = 4, forward and backward, 2 threads).
    """
    tokens = padded.shape[1] - weight.shape[1] + 1
    y = padded[:, :tokens] * weight[:, 0]
    for i in range(1, weight.shape[1]):
        y.addcmul_(padded[:, i : i + tokens], weight[:, i])
    return y


def shifted_sum_backward(padded: Tensor, weight: Tensor, d_y: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients at `padded` and `weight`."""
    tokens, d_padded = d_y.shape[1], torch.zeros_like(padded)
    d_weight = torch.empty_like(weight)
    for i in range(weight.shape[1]):
        d_padded[:, i : i + tokens].addcmul_(d_y, weight[:, i])
        d_weight[:, i] = (d_y * padded[:, i : i + tokens]).sum((0, 1))
    return d_padded, d_weight


class UnitStreams(NamedTuple):
    """Keys, values and queries of all heads, of unit norm, and the norms' factors."""

    x: Tensor  # [3, N, T, d]
    scale: Tensor  # [3, N, T, 1]


def unit_streams(padded: Tensor, weight: Tensor, heads: int) -> UnitStreams:
    """Convolve `padded [B, W - 1 + T, D]`, split it into heads and normalise, in float32 at least."""
    y = shifted_sum(padded, weight)
    wide = y.to(torch.promote_types(y.dtype, torch.float32))
    batch, tokens, _ = wide.shape
    x = wide.view(batch, tokens, 3, heads, -1).permute(2, 0, 3, 1, 4).flatten(1, 2)
    scale = (x.square().sum(-1, keepdim=True) + EPS).rsqrt()
    return UnitStreams(x * scale, scale)


def unit_streams_backward(
    padded: Tensor, weight: Tensor, made: UnitStreams, d_x: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients at `padded` and `weight` from those at the streams `[3, N, T, d]`."""
    d_y = (d_x - made.x * (d_x * made.x).sum(-1, keepdim=True)) * made.scale
    batch, (_, rows, tokens, width) = padded.shape[0], d_x.shape
    d_y = d_y.view(3, batch, rows // batch, tokens, width).permute(1, 3, 0, 2, 4).reshape(batch, tokens, -1)
    return shifted_sum_backward(padded, weight, d_y.to(padded.dtype))
