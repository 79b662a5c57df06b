"""Configurations for tests that go over all mixers."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from nested_learning.layers.config import MemoryConfig
from nested_learning.layers.mixer import FAST_LEVEL, MIXERS
from nested_learning.levels import LevelSpec, kind_of
from nested_learning.models.config import HopeConfig


def hope(
    mixer: str = "self_mod",
    levels: tuple[LevelSpec, ...] = (LevelSpec(),),
    memory: MemoryConfig | None = None,
    window: int = 5,
    **options: Any,
) -> HopeConfig:
    """A configuration without those options of `memory` and `window` that no part of the model reads."""
    reads = MIXERS[mixer].reads
    if any(kind_of(level, options.get("seq_len")) == "fast" for level in levels):
        reads = reads | FAST_LEVEL
    given = memory or MemoryConfig()
    kept = {f.name: getattr(given, f.name) for f in fields(given) if f"memory.{f.name}" in reads}
    if "window" in reads:
        options["window"] = window
    return HopeConfig(mixer=mixer, levels=levels, memory=replace(MemoryConfig(), **kept), **options)
