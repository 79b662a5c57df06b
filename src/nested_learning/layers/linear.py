"""The gated delta rule: a linear memory with a dot-product objective (Eqs. 92, 66), as a baseline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nested_learning.layers.checks import check_heads, check_held, check_input, check_kind, widened
from nested_learning.layers.config import Around, MemoryConfig
from nested_learning.layers.conv import CausalConv, ConvState
from nested_learning.layers.documents import Documents, read_apart
from nested_learning.layers.norm import RMSNorm
from nested_learning.layers.streams import (
    activate,
    gate_output,
    make_gate,
    merge_heads,
    split_heads,
    split_rates,
    start_rates,
)
from nested_learning.ops.delta_rule.chunk import (
    LinearMemory,
    LinearPiece,
    read_and_write,
    split_tokens,
)
from nested_learning.ops.kernels import use_triton
from nested_learning.ops.scan import Piece, Step, scan
from nested_learning.ops.unit import l2_normalize
from nested_learning.state import State

AROUND = Around(activation="silu")


@dataclass(frozen=True)
class LinearState(State):
    """`weights [B, H, d, d]`, and the momentum of the same shape (None without)."""

    weights: Tensor
    momentum: Tensor | None
    conv: ConvState


class GatedDeltaRule(nn.Module):
    """W_t = W_{t−1}(α_t I − η_t k kᵀ) + η_t v kᵀ, read after the write.

    Its errors do not depend on the weights, so it has no pending chunk: the chunk only sets the shape of
    the products. On a card, one kernel runs through all chunks, see `ops/delta_rule/triton.py`.

    Args:
        dim, num_heads: model width D and heads H; each head holds a d × d matrix, d = D / H.
        chunk_size: tokens that one set of products covers.
        config: delta, momentum, retention and the ranges of their rates.
        around: convolution, activation and output gate.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        chunk_size: int = 64,
        config: MemoryConfig | None = None,
        around: Around = AROUND,
    ) -> None:
        super().__init__()
        check_heads(dim, num_heads, "GatedDeltaRule")
        if chunk_size < 1:
            raise ValueError(f"GatedDeltaRule chunk_size must be at least 1, got {chunk_size}")
        self.config = config = config or MemoryConfig()
        self.heads, self.chunk_size, self.around, self.compiled = num_heads, chunk_size, around, False
        self.gates = 3 if config.momentum else 2
        self.project = nn.Linear(dim, 3 * dim, bias=False)
        self.conv = CausalConv(3 * dim, around.conv_window)
        self.rates = nn.Linear(dim, self.gates * num_heads)
        self.norm = RMSNorm(dim // num_heads)
        self.gate = make_gate(dim, around)
        self.out = nn.Linear(dim, dim, bias=False)
        eta_bias = -1.0 if config.eta_bias is None else config.eta_bias
        start_rates(self.rates, num_heads, eta_bias, config.alpha_bias)

    def init_state(self, batch: int) -> LinearState:
        """State at the start of a context: an empty memory."""
        width = self.out.weight.shape[0] // self.heads
        zeros = self.out.weight.new_zeros(batch, self.heads, width, width, dtype=widened(self.out.weight))
        return LinearState(zeros, zeros if self.config.momentum else None, self.conv.init_state(batch))

    def forward(
        self, x: Tensor, state: LinearState | None = None, documents: Documents | None = None
    ) -> tuple[Tensor, LinearState]:
        """`x [B, T, D]` → (`y [B, T, D]`, state). `documents`: those of x; only without a state."""
        check_input(x, self.out.in_features, "GatedDeltaRule")
        if documents is not None:
            return read_apart(self, x, state, documents)
        batch = x.shape[0]
        if state is None:
            state = self.init_state(batch)
        else:
            self._check_state(state, x)
        tokens, conv = self.tokens(x, state.conv)
        momentum = None if state.momentum is None else state.momentum.flatten(0, 1)
        with torch.autocast(x.device.type, enabled=False):  # the memory stays in float32
            at = LinearMemory(state.weights.flatten(0, 1), momentum)
            step, how, pieces = self._plan(tokens, at)
            answers, at = scan(step, how, at, pieces)
        y = merge_heads(torch.cat(answers, 1), batch).to(x.dtype)
        y = self.out(gate_output(self.gate, self.norm(y).flatten(2), x))
        weights, momentum = at.weights, at.momentum
        moments = None if momentum is None else momentum.view(batch, -1, *momentum.shape[1:])
        return y, LinearState(weights.view(batch, -1, *weights.shape[1:]), moments, conv)

    def tokens(self, x: Tensor, conv: ConvState) -> tuple[LinearPiece, ConvState]:
        """Queries, keys, values and rates of `x [B, T, D]`, and the convolution's state after them."""
        projected, conv = self.conv(self.project(x), conv)
        k, v, q = activate(split_heads(projected, self.heads), self.around)
        logits = split_rates(self.rates(x), self.heads).to(k.dtype)
        with torch.autocast(x.device.type, enabled=False):
            rates = self.config.rates(logits.unbind(0), self.config.step_limit(1.0))
            return LinearPiece(l2_normalize(q), l2_normalize(k), v, *rates), conv

    def _plan(self, tokens: LinearPiece, at: LinearMemory) -> tuple[Step, tuple[Any, ...], list[Piece]]:
        """How `scan` runs over the sequence: at once with our kernel where it can, else chunk by chunk."""
        how, size = ("dot", "after_write", self.config.delta), self.chunk_size
        recompute = self.config.keep_every is not None
        if tokens.k.shape[1] > size and use_triton(tokens.k.device):
            from nested_learning.ops.delta_rule import triton  # needs the package triton

            width = at.weights.shape[-1]
            if triton.supports(*how, at, size) and triton.right(width, size, tokens.k.device):
                # Compiled steps store their inputs only; nothing is compiled here, but that stays true.
                return triton.read_and_write, (size,), [Piece(tokens, False, recompute or self.compiled)]
        pieces = split_tokens(tokens[:3], tokens[3:], size)
        whole = [self.compiled and piece.k.shape[1] == size for piece in pieces]
        return read_and_write, how, [Piece(*run, recompute) for run in zip(pieces, whole, strict=True)]

    def _check_state(self, state: LinearState, x: Tensor) -> None:
        check_kind(state, LinearState, "GatedDeltaRule")
        if (state.momentum is not None) != self.config.momentum:
            raise ValueError(
                f"GatedDeltaRule state must be {'with' if self.config.momentum else 'without'} momenta"
            )
        width = self.out.in_features // self.heads
        for held in (state.weights, *([] if state.momentum is None else [state.momentum])):
            check_held(held, (self.heads, width, width), x, "GatedDeltaRule", widened(self.out.weight))
