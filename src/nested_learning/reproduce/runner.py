"""Runs a list of small trainings in parallel, one thread each, and keeps what is finished.

Every finished run is one line of a JSON-lines file: `{"task", "settings", "result"}`. A run whose task
and settings are already there is not run again, so an interrupted experiment goes on where it stopped.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Protocol

import torch

from nested_learning.lock import LOCK, locked
from nested_learning.log_lines import read_log
from nested_learning.progress import progress_bar
from nested_learning.runtime import keep_freed_memory, pick_device
from nested_learning.train.checkpoint import write_atomic
from nested_learning.train.plain_loop import use_device

Result = dict[str, Any]
Tick = Callable[[int], object]
Where = tuple[torch.device, bool]
"""The device of runs, and whether they compile their models."""
POLL_SECONDS = 0.5


class Run(Protocol):
    """One training: a dataclass of plain values that decide its result, and how to get it."""

    @property
    def steps(self) -> int:
        """Length of the run, for the progress bar."""
        ...

    def run(self, tick: Tick) -> Result:
        """Train; call `tick(n)` after n more steps. The result holds what JSON can hold."""
        ...


def settings_of(run: Run) -> dict[str, Any]:
    """The fields of a run as JSON would give them back."""
    plain: dict[str, Any] = json.loads(json.dumps(asdict(run)))  # type: ignore[call-overload]
    return plain


def run_key(run: Run) -> str:
    """Equal for two runs exactly when they have the same kind and the same settings."""
    return _key(type(run).__name__, settings_of(run))


def run_all(
    runs: Sequence[Run],
    path: Path,
    workers: int = 2,
    progress: bool = True,
    device: str = "cpu",
    compiled: bool = False,
) -> list[Result]:
    """Results of `runs`, in their order; only those that `path` does not hold yet are run.

    Args:
        runs: equal runs are run once.
        path: the JSON-lines file to read from and append to.
        workers: processes at a time, each with one thread. One worker runs in this process.
        progress: show a bar that counts steps.
        device: where they train; see `runtime.pick_device`.
        compiled: compile the models; see `models.compile`. Results differ by rounding.

    Raises:
        InUseError: another process writes to `path`.
        ValueError: fewer than one worker.
        Exception: what a run raised, after the runs under way were finished and kept.
    """
    if workers < 1:
        raise ValueError(f"jobs must be at least 1, got {workers}")
    with locked_results(path):
        return _run_missing(runs, path, workers, progress, (pick_device(device), compiled))


def locked_results(path: Path) -> AbstractContextManager[None]:
    """Keeps other processes from writing to a file of results. InUseError if one does."""
    return locked(path.with_name(path.name + LOCK), f"result file {path}")


def _run_missing(runs: Sequence[Run], path: Path, workers: int, progress: bool, where: Where) -> list[Result]:
    done = read_results(path)
    todo = list({run_key(run): run for run in runs if run_key(run) not in done}.values())
    if todo and progress:
        print(f"{len(todo)} runs to do, {len(done)} kept in {path}")
    total = sum(run.steps for run in todo)
    with progress_bar(total=total, unit="step", shown=progress and bool(todo)) as bar:
        execute = _one_by_one(todo, bar, where) if workers == 1 else _in_processes(todo, workers, bar, where)
        for run, result in execute:
            _append(path, run, result)
            done[run_key(run)] = result
    return [done[run_key(run)] for run in runs]


def read_results(path: Path) -> dict[str, Result]:
    """Finished runs of a JSON-lines file by `run_key`; damaged lines are removed from it."""
    rows, whole = read_log(path, lambda row: row.keys() >= {"task", "settings", "result"})
    if not whole:
        write_atomic(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
    return {_key(row["task"], row["settings"]): row["result"] for row in rows}


def _key(task: str, settings: dict[str, Any]) -> str:
    return f"{task} {json.dumps(settings, sort_keys=True)}"


def _append(path: Path, run: Run, result: Result) -> None:
    row = {"task": type(run).__name__, "settings": settings_of(run), "result": result}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, allow_nan=False) + "\n")


def _one_by_one(todo: list[Run], bar: Any, where: Where) -> Iterator[tuple[Run, Result]]:
    for run in todo:
        with one_thread():
            use_device(*where)
            result = run.run(bar.update)
        yield run, result


def _in_processes(todo: list[Run], workers: int, bar: Any, where: Where) -> Iterator[tuple[Run, Result]]:
    """Results as they come in. The workers count their steps in one shared number, which the bar shows."""
    context = get_context("spawn")  # a fork would copy the threads' locks of a used PyTorch
    counter = context.Value("q", 0)
    error: BaseException | None = None
    with ProcessPoolExecutor(workers, context, _start_worker, (counter, where)) as pool:
        futures = {pool.submit(_work, run): run for run in todo}
        pending = set(futures)
        try:
            while pending:
                finished, pending = wait(pending, POLL_SECONDS, FIRST_COMPLETED)
                bar.update(counter.value - bar.n)
                for future in finished:
                    error = error or future.exception()
                    if future.exception() is None:
                        yield futures[future], future.result()
                if error is not None:  # let those under way finish; start no more
                    pending = {future for future in pending if not future.cancel()}
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    if error is not None:
        raise error


@contextmanager
def one_thread() -> Iterator[None]:
    """PyTorch with one thread inside, as before outside."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


_steps_done: Any = None  # in a worker: the number shared with its parent


def _start_worker(counter: Any, where: Where) -> None:
    global _steps_done
    _steps_done = counter
    keep_freed_memory()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends a worker at once and without a traceback
    torch.set_num_threads(1)
    use_device(*where)


def _work(run: Run) -> Result:
    return run.run(_count)


def _count(steps: int) -> None:
    with _steps_done.get_lock():
        _steps_done.value += steps
