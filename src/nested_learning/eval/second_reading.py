"""How much a pretrained model keeps of a text that it has read once, by layers, rate and steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from nested_learning.adapt import AdaptConfig, memorize, restart
from nested_learning.eval.scorer import read_losses
from nested_learning.levels import LevelSpec
from nested_learning.models.pretrained import PretrainedLevels
from nested_learning.report import markdown_table

Reading = tuple[str, float, int, float, float, float, float]
"""Layers, rate and steps; mean losses without learning, of passage and other text; and both after it."""


def second_readings(
    hf_model: Any,
    passage: Tensor,
    other: Tensor,
    layers: Sequence[tuple[int, ...]],
    rates: Sequence[float],
    steps: Sequence[int],
    chunk_size: int = 64,
) -> Iterator[Reading]:
    """Read `passage [B, T+1]` and learn from it; then read it and `other [B, T+1]` in a new context.

    Args:
        hf_model: see `levels_from_pretrained`; its parameters are not changed.
        layers: for every setting, the decoder layers that learn.
        rates, steps: values of `AdaptConfig`, in all combinations.
        chunk_size: tokens between two writes.

    Yields:
        A `Reading`, with losses in nats. The first one learns nothing.
    """
    plain = PretrainedLevels(hf_model, [LevelSpec(name="fast", chunk_size=chunk_size, layers=layers[0])])
    before = [float(read_losses(plain, text, size=chunk_size).mean()) for text in (passage, other)]
    yield "none", 0.0, 0, before[0], before[1], before[0], before[1]
    for chosen in layers:
        model = PretrainedLevels(hf_model, [LevelSpec(name="fast", chunk_size=chunk_size, layers=chosen)])
        for rate in rates:
            for count in steps:
                config = AdaptConfig(chunk_size=chunk_size, lr=rate, steps=count)
                _, state = memorize(model, passage, config=config)
                memory = restart(model, state)
                after = [
                    float(read_losses(model, text, memory, chunk_size).mean()) for text in (passage, other)
                ]
                yield ",".join(map(str, chosen)), rate, count, before[0], before[1], after[0], after[1]


def table(readings: Sequence[Reading]) -> str:
    """The readings as a Markdown table."""
    header = ["layers", "lr", "steps", "1st reading", "2nd reading", "other text before", "after"]
    rows = [
        [layers, f"{rate:g}", str(steps), f"{first:.3f}", f"{second:.3f}", f"{other:.3f}", f"{after:.3f}"]
        for layers, rate, steps, first, other, second, after in readings
    ]
    return markdown_table(header, rows)
