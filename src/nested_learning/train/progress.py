"""The terminal: progress bar, speed, and signals such as Ctrl-C."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Self

from nested_learning.progress import progress_bar


class Clock:
    """Measures steps per second, without the pauses for validation and saving."""

    def __init__(self, step: int) -> None:
        self.start = time.perf_counter()
        self.step = step

    def rate(self, step: int) -> float:
        """Steps per second since the last call; `step` is the number of the current one."""
        now = time.perf_counter()
        rate = (step - self.step) / max(now - self.start, 1e-9)
        self.start, self.step = now, step
        return rate

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent inside is not counted."""
        before = time.perf_counter()
        try:
            yield
        finally:
            self.start += time.perf_counter() - before


class Progress:
    """A progress bar with loss, tokens per second, memory and time left; lines now and then in a log file.

    If the terminal is closed, the bar becomes silent and the run continues.
    """

    def __init__(self, steps: int, done: int, shown: bool) -> None:
        self.bar: Any = progress_bar(
            total=steps,
            initial=done,
            shown=shown,
            unit="step",
            dynamic_ncols=True,
            bar_format="{l_bar}{bar}| {n:.5g}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]",
        )

    def reach(self, steps: float) -> None:
        """Show that `steps` steps are done; a fraction counts too, because a step may take hours."""
        with self._while_there():
            self.bar.update(steps - self.bar.n)

    def show(self, record: dict[str, float]) -> None:
        """Show the numbers of a metrics record after the bar."""
        with self._while_there():
            self.bar.set_postfix_str(
                f"loss {record['loss']:.3f}, {record['tokens_per_second']:.0f} tok/s, "
                f"{record['memory_gib']:.2f} GiB"
            )

    def print(self, line: str) -> None:
        """Print a line above the bar."""
        if not self.bar.disable:
            with self._while_there():
                self.bar.write(line)

    def close(self) -> None:
        """Close the bar and leave it on the screen."""
        with self._while_there():
            self.bar.close()

    @contextmanager
    def _while_there(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            self.bar.disable = True


class StopSignals:
    """SIGINT, SIGTERM and SIGHUP ask for a stop after the current step; a second one stops at once.

    A signal that the process was started to ignore (`nohup`) stays ignored. After SIGHUP, which says that the
    terminal is closed, output to it is dropped, because writing there would be an error. Python handles
    signals in the main thread only; in another thread this class does nothing.

    Args:
        insist: whether a second signal stops at once. False under `torchrun`, which forwards a Ctrl-C to
            processes that have already received it from the terminal, and kills them if they take too long.
    """

    def __init__(self, insist: bool = True) -> None:
        self.insist = insist
        self.received: int | None = None
        self.former: dict[int, Any] = {}
        self.terminals: list[int] = []

    def __enter__(self) -> Self:
        self.received = None
        if threading.current_thread() is threading.main_thread():
            self.terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self.former[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.former.items():
            signal.signal(number, handler)
        self.former = {}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        if number == signal.SIGHUP:
            self._leave_terminals()
        if not self.insist:
            return
        for name, handler in self.former.items():  # a second signal goes to the previous handler
            signal.signal(name, handler)

    def _leave_terminals(self) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for descriptor in self.terminals:
            os.dup2(nowhere, descriptor)
        os.close(nowhere)
