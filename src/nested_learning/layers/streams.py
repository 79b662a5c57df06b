"""From a model's channels to the streams of its heads, and back: what stands around every memory.

Shapes: B batch, T tokens, D model width, H heads, d = D / H, G rates (η, α and, with momentum, β).
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nested_learning.layers.config import Around
from nested_learning.layers.conv import CausalConv, ConvState
from nested_learning.ops.self_modifying.chunk import Streams
from nested_learning.ops.unit import l2_normalize


def start_rates(rates: nn.Linear, heads: int, eta_bias: float, alpha_bias: float) -> None:
    """Logits of η, α (and β) start near their configured biases and depend on the input from the start."""
    nn.init.normal_(rates.weight, std=0.02)
    with torch.no_grad():
        bias = rates.bias.view(-1, heads)
        bias[0], bias[1] = eta_bias, alpha_bias
        bias[2:] = 0.0


def split_heads(projected: Tensor, heads: int) -> Tensor:
    """k, v, q of all heads, in float32 at least: `[B, T, 3·D]` → `[3, B·H, T, d]`."""
    wide = projected.to(torch.promote_types(projected.dtype, torch.float32))
    batch, tokens, _ = wide.shape
    return wide.view(batch, tokens, 3, heads, -1).permute(2, 0, 3, 1, 4).flatten(1, 2)


def split_rates(logits: Tensor, heads: int) -> Tensor:
    """`[B, T, G·H]` → `[G, B·H, T]`."""
    batch, tokens, _ = logits.shape
    return logits.view(batch, tokens, -1, heads).permute(2, 0, 3, 1).flatten(1, 2)


class Projected(Protocol):
    """A layer whose streams `project_streams` makes."""

    conv: CausalConv
    project: nn.Linear
    rates: nn.Linear
    heads: int
    around: Around


def project_streams(layer: Projected, x: Tensor, conv: ConvState | None) -> tuple[Streams, ConvState]:
    """Slow projections of `x [B, T, D]`, and the state of the convolution (None: a start)."""
    mixed, conv = layer.conv(layer.project(x), conv)
    logits = split_rates(layer.rates(x), layer.heads)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    with torch.autocast(x.device.type, enabled=False):
        k, v, q = l2_normalize(activate(split_heads(mixed, layer.heads), layer.around))
    return Streams(k, v, q, logits), conv


def merge_heads(y: Tensor, batch: int) -> Tensor:
    """`[B·H, T, d]` → `[B, T, H, d]`."""
    return y.view(batch, -1, *y.shape[1:]).transpose(1, 2)


def activate(streams: Tensor, around: Around) -> Tensor:
    """Keys, values and queries after the convolution: their activation, if they have one."""
    return F.silu(streams) if around.activation == "silu" else streams


def make_gate(dim: int, around: Around) -> nn.Linear | None:
    """The projection of the output gate, None where there is none."""
    return nn.Linear(dim, dim, bias=False) if around.output_gate else None


def gate_output(gate: nn.Linear | None, y: Tensor, x: Tensor) -> Tensor:
    """y ⊙ silu(W_gate x), or y without a gate; `y, x [B, T, D]`.

    A memory that knows nothing yet answers with noise; the gate keeps it out of the residual stream.
    """
    return y if gate is None else y * F.silu(gate(x))
