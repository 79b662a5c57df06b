"""Levels of a Continuum Memory System: who updates, and how often (in tokens)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

LevelKind = Literal["fast", "slow", "plain"]


@dataclass(kw_only=True, slots=True)
class LevelSpec:
    """One level of the Continuum Memory System (§7.1 of the paper).

    A level without a `chunk_size` is plain: an ordinary SwiGLU MLP. One whose `chunk_size` is less than the
    training sequence is fast: a fast weight of each sequence, written in the forward pass. One whose
    `chunk_size` is more is slow: a SwiGLU MLP that the optimizer steps every `chunk_size` tokens.

    Args:
        name: unique within a model; names the level in calendars, logs and checkpoints.
        chunk_size: update period in tokens, or None for an ordinary MLP.
        expansion: hidden width over model width; None = 8/3 for an ordinary MLP, 1 for a fast level.
    """

    name: str = "mlp"
    chunk_size: int | None = None
    expansion: float | None = None

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("levels.name must not be empty")
        if self.chunk_size is not None and self.chunk_size < 1:
            raise ValueError(f"levels.{self.name}.chunk_size must be at least 1, got {self.chunk_size}")
        if self.expansion is not None and self.expansion <= 0:
            raise ValueError(f"levels.{self.name}.expansion must be positive, got {self.expansion}")


def kind_of(level: LevelSpec, seq_len: int | None) -> LevelKind:
    """Whether a level is "fast", "slow" or "plain" where training sequences have `seq_len` tokens.

    None = sequences without end: no level is slow.
    """
    if level.chunk_size is None:
        return "plain"
    return "slow" if seq_len is not None and level.chunk_size > seq_len else "fast"
