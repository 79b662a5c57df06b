"""What runs on a GPU, captured as a CUDA graph: all its kernels are started at once."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

WARM_UP = 3
"""Runs before a capture, in which libraries set up what they keep, and functions are compiled."""


@dataclass(frozen=True, slots=True)
class Replay:
    """What was captured: `run` does it again, and `result` is the tensor that it writes to.

    `pool` is the memory of the graph, which other graphs may share that never run at the same time.
    """

    result: Tensor
    run: Callable[[], object]
    pool: Any = None

    def __call__(self) -> Tensor:
        """Do it again; the next call writes into the same result."""
        self.run()
        return self.result


def capture(
    run: Callable[[], Tensor],
    device: torch.device,
    warm_up: Callable[[], None] | None = None,
    pool: Any = None,
) -> Replay:
    """`run` as one CUDA graph. It runs during `warm_up`, and is then only recorded.

    Args:
        run: reads and writes tensors that stay where they are, and waits for nothing.
        device: a CUDA device.
        warm_up: runs before the capture, on the same stream; None = `run`, `WARM_UP` times.
        pool: of an earlier graph of this device, to share its memory.
    """
    stream = _side_stream(device)
    # A capture that fails leaves its own stream as the current one.
    with torch.cuda.device(device), torch.cuda.stream(torch.cuda.current_stream(device)), uncached(device):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            if warm_up is not None:
                warm_up()
            else:
                for _ in range(WARM_UP):
                    run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Threads of a loader may pin memory meanwhile, which a "global" capture would forbid.
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            result = run()
    return Replay(result, graph.replay, graph.pool())


def uncached(device: torch.device) -> AbstractContextManager[object]:
    """Inside of a surrounding autocast, the same one, which keeps no casts of weights.

    It drops them when it ends, and a graph would go on reading them. An autocast inside of what is captured
    ends with it, and may keep them.
    """
    if not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, torch.get_autocast_dtype(device.type), cache_enabled=False)


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One stream for all captures on a device: graphs that share memory must come from the same one."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
