"""Fair timing on a machine that is never quite quiet: every round runs every model once, A B C A B C …"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from nested_learning.bench.machine import synchronize

Run = Callable[[], object]
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Spread:
    """Smallest, middle and largest of some values."""

    min: float
    median: float
    max: float


def spread(values: Sequence[float]) -> Spread:
    """Summary of at least one value."""
    return Spread(min(values), statistics.median(values), max(values))


def interleave(
    runs: Mapping[str, Run], repeats: int, device: str, progress: Progress, warmup: int = 1
) -> dict[str, list[float]]:
    """Seconds of every run, one value per round; `warmup` rounds before them are not kept."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(-warmup, repeats):
        gc.collect()
        for name, run in runs.items():
            elapsed = seconds_of(run, device)
            label = f"round {round_ + 1}/{repeats}" if round_ >= 0 else "warm-up"
            progress(f"{label} {name}: {elapsed:.4g} s")
            if round_ >= 0:
                seconds[name].append(elapsed)
    return seconds


def seconds_of(run: Run, device: str) -> float:
    """Seconds of one call: between two CUDA events on a card, by the clock elsewhere."""
    synchronize(device)
    if device.startswith("cuda"):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        run()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def relative_speed(yardstick: Sequence[float], seconds: Sequence[float]) -> Spread:
    """Yardstick's time over the model's, within each round: above 1 means faster than the yardstick."""
    return spread([a / b for a, b in zip(yardstick, seconds, strict=True)])
