"""What this machine can do, measured: rates of matrix products and of copies. They give the floors."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from nested_learning.bench.flops import Work

LARGE = 1024  # side of the large product
SMALL = 64  # side of the batched products, and how many of them
COPY_BYTES = 2**28  # beyond any cache


@dataclass(frozen=True)
class MachineRates:
    """Measured rates: products in FLOP/s (large, and batched 64 × 64 × 64 in float32), copies in bytes/s.

    `copy` counts the bytes read plus the bytes written. `itemsize` is that of the large product's numbers.
    """

    large: float
    batched: float
    copy: float
    itemsize: int = 4


@dataclass(frozen=True)
class Floor:
    """Seconds that the counted work must take here: `large` if all of it ran at the rate of large products,
    `mixed` if the small products ran at the rate of batched ones, `copy` for moving the numbers."""

    large: float
    mixed: float
    copy: float


def measure_rates(device: str, dtype: torch.dtype) -> MachineRates:
    """Best of several runs each. `dtype` is that of the large product; fast weights stay in float32."""
    big = torch.randn(2, LARGE, LARGE, device=device).to(dtype)
    small = torch.randn(2, SMALL, SMALL, SMALL, device=device)
    source = torch.ones(COPY_BYTES // 4, device=device)
    target = torch.zeros_like(source)
    return MachineRates(
        large=2 * LARGE**3 / best_seconds(lambda: big[0] @ big[1], device),
        batched=2 * SMALL**4 / best_seconds(lambda: torch.bmm(small[0], small[1]), device),
        copy=2 * COPY_BYTES / best_seconds(lambda: target.copy_(source), device),
        itemsize=dtype.itemsize,
    )


def floor_seconds(work: Iterable[Work], rates: MachineRates, factor: float = 1.0) -> Floor:
    """Floors of `factor` times the given work (1 = forward, 3 = forward and backward)."""
    dense = batched = moved = 0.0
    for item in work:
        if item.batched:
            batched += item.flops
        else:
            dense += item.flops
        moved += item.numbers * (4 if item.batched else rates.itemsize)
    large = (dense + batched) / rates.large
    mixed = dense / rates.large + batched / rates.batched
    return Floor(factor * large, factor * mixed, factor * moved / rates.copy)


def describe(device: str) -> dict[str, str | int]:
    """Processor, threads and versions, for the report."""
    return {
        "processor": torch.cuda.get_device_name(device) if device.startswith("cuda") else _cpu_name(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def synchronize(device: str) -> None:
    """Wait for the device; nothing to wait for on a CPU."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def best_seconds(run: Callable[[], object], device: str, repeats: int = 10) -> float:
    """Shortest time in seconds of `repeats` runs, after one to warm up."""
    seconds = []
    for _ in range(1 + repeats):
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
