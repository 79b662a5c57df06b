"""What a pretrained model keeps of a text that it has read once, by rate, layers and steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from nested_learning.adapt import AdaptConfig, memorize, restart, score
from nested_learning.levels import LevelSpec
from nested_learning.models.pretrained import PretrainedLevels

Row = tuple[str, float, int, float, float, float, float]


def second_readings(
    hf_model: Any,
    passage: Tensor,
    other: Tensor,
    layers: Sequence[tuple[int, ...]],
    rates: Sequence[float],
    steps: Sequence[int],
    chunk_size: int = 64,
) -> Iterator[Row]:
    """Read `passage [B, T+1]` and learn from it; then read it and `other [B, T+1]` in a new context.

    Args:
        hf_model: see `levels_from_pretrained`; its parameters are not changed.
        layers: for every setting the decoder layers that learn.
        rates, steps: of `AdaptConfig`, all combinations.
        chunk_size: tokens between two writes.

    Returns:
        Layers, rate, steps, then mean losses in nats: of the passage and of the other text without learning,
        and of both after it. The first row learns nothing.
    """
    plain = PretrainedLevels(hf_model, [LevelSpec(name="fast", chunk_size=chunk_size, layers=layers[0])])
    before = mean_loss(plain, passage, None, chunk_size), mean_loss(plain, other, None, chunk_size)
    yield "none", 0.0, 0, before[0], before[1], *before
    for chosen in layers:
        model = PretrainedLevels(hf_model, [LevelSpec(name="fast", chunk_size=chunk_size, layers=chosen)])
        for rate in rates:
            for count in steps:
                config = AdaptConfig(chunk_size=chunk_size, lr=rate, steps=count)
                _, state = memorize(model, passage, config=config)
                memory = restart(model, state)
                after = [mean_loss(model, text, memory, chunk_size) for text in (passage, other)]
                yield ",".join(map(str, chosen)), rate, count, *before, after[0], after[1]


def mean_loss(model: PretrainedLevels, tokens: Tensor, state: Any, size: int) -> float:
    """Mean loss in nats of `tokens [B, T+1]`, read in parts: the logits of a large vocabulary are large."""
    found = []
    for first in range(0, tokens.shape[1] - 1, size):
        losses, state = score(model, tokens[:, first : first + size + 1], state)
        found.append(losses)
    return float(torch.cat(found, 1).mean())


def table(rows: Sequence[Row]) -> str:
    """Markdown."""
    lines = [
        "| layers | lr | steps | 1st reading | 2nd reading | other text before | after |",
        "|---" * 7 + "|",
    ]
    for layers, rate, steps, first, other, second, after in rows:
        lines.append(
            f"| {layers} | {rate:g} | {steps} | {first:.3f} | {second:.3f} | {other:.3f} | {after:.3f} |"
        )
    return "\n".join(lines)
