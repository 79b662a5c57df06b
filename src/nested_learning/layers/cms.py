"""The Continuum Memory System (Eqs. 70–73): a chain of MLP blocks, each with its own update period.

A level without a `chunk_size` is an ordinary SwiGLU MLP. A level with one is a two-layer memory of each
sequence, written every `chunk_size` tokens towards learned values of its input. Levels are applied in order,
each with a norm before it and a residual around it, so one ordinary level is the MLP of a Transformer block.

Shapes: B batch, T tokens, D model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nested_learning.layers.memory import (
    Fast,
    MemoryMLP,
    MemoryState,
    Written,
    rates_from_logits,
    segments,
    write_memories,
)
from nested_learning.layers.mlp import SwiGLU, swiglu_width
from nested_learning.layers.norm import RMSNorm, l2_normalize
from nested_learning.layers.streams import split_rates, start_rates
from nested_learning.levels import LevelSpec, kind_of
from nested_learning.models.config import MemoryConfig
from nested_learning.ops.memory_mlp.fused import read
from nested_learning.state import State


@dataclass(frozen=True)
class FastLevelState(State):
    """Fast weights of a level, and what its unfinished chunk will write (`[B, 1, n, …]`, None = nothing)."""

    memory: MemoryState
    pending: tuple[Tensor | None, ...] | None
    position: int


@dataclass(frozen=True)
class CMSState(State):
    """One state per level, None for ordinary levels."""

    levels: tuple[Any, ...]


class FastLevel(nn.Module):
    """y = W₁ σ̂(W₂ x̂), with W₁ and W₂ written every `chunk_size` tokens to map keys to values of x.

    Args:
        dim: model width.
        spec: name, chunk size and expansion (hidden width over model width, 1 by default).
        memory: the write's switches and rates.
    """

    def __init__(self, dim: int, spec: LevelSpec, memory: MemoryConfig) -> None:
        super().__init__()
        assert spec.chunk_size is not None
        self.chunk_size, self.config = spec.chunk_size, memory
        hidden = round(dim * (spec.expansion or 1))
        self.initial = MemoryMLP(1, dim, hidden, dim)
        self.keys_values = nn.Linear(dim, 2 * dim, bias=False)
        self.rates = nn.Linear(dim, 3 if memory.momentum else 2)
        start_rates(self.rates, 1, memory.step_bias(spec.chunk_size), memory.alpha_bias)

    def init_state(self, batch: int) -> FastLevelState:
        """State at the start of a context."""
        start = self.initial.start(batch, self.config.momentum)
        return FastLevelState(MemoryState.pack(start, batch), None, 0)

    def forward(self, x: Tensor, state: FastLevelState | None = None) -> tuple[Tensor, FastLevelState]:
        """`x [B, T, D]` → (`y [B, T, D]`, state). Tokens read the weights of their chunk's start."""
        batch, tokens, _ = x.shape
        state = self.init_state(batch) if state is None else state
        written = self._written(x)
        memory, pending, position = state.memory.unpack(), Written.unpack(state.pending), state.position
        answers = []
        with torch.autocast(x.device.type, enabled=False):  # fast weights stay in float32
            queries = l2_normalize(x.to(written.k.dtype))
            lengths = segments(tokens, position, self.chunk_size)
            for query, new in zip(torch.split(queries, lengths, 1), written.split(lengths), strict=True):
                answers.append(read(memory.weights, query))
                pending = new if pending is None else pending.join(new)
                position += query.shape[1]
                if position == self.chunk_size:
                    memory, pending, position = self._write(memory, pending, batch), None, 0
        after = FastLevelState(
            MemoryState.pack(memory, batch), None if pending is None else pending.pack(batch), position
        )
        return torch.cat(answers, 1).to(x.dtype), after

    def _written(self, x: Tensor) -> Written:
        projected = self.keys_values(x)
        wide = projected.to(torch.promote_types(projected.dtype, torch.float32))
        k, v = l2_normalize(wide.unflatten(-1, (2, x.shape[-1]))).unbind(-2)
        logits = split_rates(self.rates(x), 1).to(wide.dtype)
        return Written(k, v, *rates_from_logits(logits.unbind(0), self.config, self.chunk_size))

    def _write(self, memory: Fast, tokens: Written, batch: int) -> Fast:
        towards = self.config.retention and self.config.retention_target == "init"
        initial = self.initial.initial(batch) if towards else None
        # P = 0, so the residual is −v: the residual connection is outside the level
        return write_memories(tokens, [-tokens.v], [memory], self.config, [initial])[0]


class CMS(nn.Module):
    """A chain of levels, each with a norm before it and a residual around it.

    Args:
        dim: model width.
        levels: the levels, in the order they are applied.
        variant: "sequential" (Eq. 73).
        memory: how fast levels are written.
        eps: added to mean squares in the norms.
        seq_len: tokens of a training sequence; a level with a longer period is slow. None = no level is.
    """

    def __init__(
        self,
        dim: int,
        levels: Sequence[LevelSpec],
        variant: str = "sequential",
        memory: MemoryConfig | None = None,
        eps: float = 1e-6,
        seq_len: int | None = None,
    ) -> None:
        super().__init__()
        if variant != "sequential":
            raise ValueError(f"CMS variant must be 'sequential', got {variant!r}")
        memory = memory or MemoryConfig()
        self.specs = tuple(levels)
        self.kinds = tuple(kind_of(spec, seq_len) for spec in levels)
        self.norms = nn.ModuleList(RMSNorm(dim, eps) for _ in levels)
        self.levels = nn.ModuleList(
            FastLevel(dim, spec, memory)
            if kind == "fast"
            else SwiGLU(dim, swiglu_width(dim, spec.expansion or 8 / 3))
            for spec, kind in zip(levels, self.kinds, strict=True)
        )

    def slow_parameters(self) -> dict[str, list[str]]:
        """Names of the parameters of every slow level, its norm's included."""
        names: dict[str, list[str]] = {}
        for i, (spec, kind) in enumerate(zip(self.specs, self.kinds, strict=True)):
            if kind == "slow":
                level = [f"levels.{i}.{name}" for name, _ in self.levels[i].named_parameters()]
                names[spec.name] = [f"norms.{i}.weight", *level]
        return names

    def init_state(self, batch: int) -> CMSState:
        """State at the start of a context."""
        return CMSState(tuple(m.init_state(batch) if isinstance(m, FastLevel) else None for m in self.levels))

    def forward(self, x: Tensor, state: CMSState | None = None) -> tuple[Tensor, CMSState]:
        """`x [B, T, D]` → (x plus what the levels add, state)."""
        state = self.init_state(x.shape[0]) if state is None else state
        after: list[Any] = []
        for norm, level, before in zip(self.norms, self.levels, state.levels, strict=True):
            y, new = level(norm(x), before)
            x = x + y
            after.append(new)
        return x, CMSState(tuple(after))
