"""Learning-rate schedules: pure functions of the step, so that nothing needs saving to resume."""

from __future__ import annotations

import math


def warmup(step: int, warmup_steps: int) -> float:
    """Linear warm-up factor in (0, 1]: 1/W at step 0, 1 from step W - 1 on."""
    return min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0


def constant(step: int, warmup_steps: int = 0) -> float:
    """Factor of a constant schedule after a linear warm-up."""
    return warmup(step, warmup_steps)


def cosine(step: int, total_steps: int, warmup_steps: int = 0, min_ratio: float = 0.0) -> float:
    """Factor of a cosine schedule after a linear warm-up (Loshchilov & Hutter 2017, one cycle).

    Args:
        step: number of updates made before this one.
        total_steps: step at which the factor reaches `min_ratio`, and stays there.
        warmup_steps: length of the warm-up, a part of `total_steps`.
        min_ratio: last factor over the highest one.
    """
    if step < warmup_steps:
        return warmup(step, warmup_steps)
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * progress))
