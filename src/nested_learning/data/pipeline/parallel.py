"""A parallel map over a stream: results in the order of the inputs, bounded memory."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any, TypeVar

Input = TypeVar("Input")
Output = TypeVar("Output")


def ordered_map(
    function: Callable[[Input], Output],
    inputs: Iterable[Input],
    workers: int,
    initializer: Callable[..., None],
    arguments: tuple[Any, ...],
) -> Iterator[Output]:
    """Apply `function` to each input, in the order of the inputs, whatever the number of workers.

    Args:
        function: called in a worker, or here.
        inputs: read lazily, at most two per worker ahead of the results.
        workers: processes; 0 = compute in this process.
        initializer, arguments: called once in every process, before `function`.
    """
    if not workers:
        initializer(*arguments)
        yield from map(function, inputs)
        return
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    setup = (os.getpid(), initializer, arguments)
    with ProcessPoolExecutor(workers, context, _start_worker, setup) as pool:
        waiting: deque[Future[Output]] = deque()
        try:
            for value in inputs:
                waiting.append(pool.submit(function, value))
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _start_worker(parent: int, initializer: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then ends its workers
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    initializer(*arguments)


def _end_with(parent: int) -> None:
    """Workers poll for the parent, which cannot stop them if it is killed."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)
