"""Where and with what a run was started: `starts.jsonl` in its directory, a line per start."""

from __future__ import annotations

import json
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from nested_learning.extras import own_version
from nested_learning.log_lines import Row, read_log
from nested_learning.train.checkpoint.store import write_atomic
from nested_learning.train.strategy import Strategy

STARTS = "starts.jsonl"


def record_start(folder: Path, step: int, strategy: Strategy, resumed: bool) -> None:
    """Add a line to `starts.jsonl` in `folder`; a run that begins anew forgets the lines of the former one.

    Args:
        folder: the run directory.
        step: updates made before this start.
        strategy: the processes and devices of the run.
        resumed: whether it goes on from a checkpoint.
    """
    path = folder / STARTS
    before = read_starts(folder) if resumed else []
    rows = [*before, describe_start(step, strategy)]
    write_atomic(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def describe_start(step: int, strategy: Strategy) -> dict[str, Any]:
    """Step, time (UTC), devices and versions, as JSON values."""
    device = strategy.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device_name(device)
    return {
        "step": step,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": name,
        "devices": strategy.world_size,
        "strategy": strategy.name,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "nested_learning": own_version(),
    }


def device_name(device: torch.device) -> str:
    """What a device without a name of its own is called: its kind, and the processor of a CPU."""
    return f"{device.type} ({platform.machine()})" if device.type == "cpu" else device.type


def read_starts(folder: Path) -> list[Row]:
    """The starts of a run, oldest first; none if it was made by a version that did not record them."""
    return read_log(folder / STARTS, lambda row: isinstance(row.get("step"), int))[0]
