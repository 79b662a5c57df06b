"""Mapping a function over a stream in worker processes, results in order, memory bounded."""

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
    """`function` of each input, in the order of the inputs; the same values for any number of workers.

    workers: processes; 0 = compute here. At most two inputs per worker are taken ahead of the results.
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
    """A killed parent cannot end its workers, so they look."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)
