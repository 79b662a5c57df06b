"""Levels of a Continuum Memory System: who updates, and how often (in tokens)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(kw_only=True, slots=True)
class LevelSpec:
    """One level of the Continuum Memory System (§7.1 of the paper).

    A level with a `chunk_size` is a fast weight of each sequence, written in the forward pass every
    `chunk_size` tokens. A level without one is an ordinary SwiGLU MLP.

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

    @property
    def is_fast(self) -> bool:
        """Whether the level is written inside the forward pass."""
        return self.chunk_size is not None
