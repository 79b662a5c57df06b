"""Titans: the same memory without self-modification, as a baseline."""

from __future__ import annotations

from dataclasses import replace

from nested_learning.layers.self_modifying import SelfModifyingTitans
from nested_learning.models.config import MemoryConfig


class TitansMemory(SelfModifyingTitans):
    """M_memory written towards the slow values v, with slow projections and slow rates.

    `SelfModifyingTitans` with no adaptive projection and no self-made targets; the arguments are the same.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        chunk_size: int = 64,
        read: str = "chunk",
        config: MemoryConfig | None = None,
    ) -> None:
        slow = replace(config or MemoryConfig(), adaptive=(), self_targets=False)
        super().__init__(dim, num_heads, chunk_size, read, slow)
