"""Save a run and resume it, together with all other ranks."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn
from torch.optim import Optimizer

from nested_learning.data.loader import TokenLoader
from nested_learning.data.tokenizer import Tokenizer
from nested_learning.optim.base import is_sharded
from nested_learning.optim.options import read_options, write_options
from nested_learning.runtime import random_state, set_random_state
from nested_learning.train.checkpoint.errors import CheckpointError, cause
from nested_learning.train.checkpoint.manifest import read_manifest
from nested_learning.train.checkpoint.run_file import (
    RUN,
    VERSION,
    WRONG_VALUES,
    read_plain,
    read_run,
)
from nested_learning.train.checkpoint.same_run import check_same_run
from nested_learning.train.checkpoint.store import CheckpointStore, damage, other_whole, write_atomic
from nested_learning.train.config import RunConfig
from nested_learning.train.strategy import Strategy

Metrics = dict[str, float]


@dataclass(kw_only=True, slots=True)
class Training:
    """The parts of a run that a checkpoint saves and restores. `text` is the corpus's fingerprint."""

    config: RunConfig
    model: nn.Module
    optimizer: Optimizer
    loader: TokenLoader
    tokenizer: Tokenizer
    text: str


class Checkpointer:
    """Writes and reads the checkpoints of a run. Every rank makes the same calls.

    Args:
        store: the folder of the checkpoints.
        training: what is saved and restored.
        strategy: the ranks that take part.
        background: `save` returns when tensors are copied; a thread writes them. `wait` waits for it.
    """

    def __init__(
        self, store: CheckpointStore, training: Training, strategy: Strategy, background: bool = False
    ) -> None:
        self.store, self.training, self.strategy, self.background = store, training, strategy, background
        self.pending: tuple[int, Future[Any]] | None = None

    def save(self, step: int, metrics: Metrics) -> None:
        """Write a checkpoint after `step` updates and make it the latest.

        Raises:
            CheckpointError: it cannot be written, on any rank. The former checkpoints stay as they are. With
                `background`, the error of one save is raised by the next, or by `wait`.
        """
        self.wait()
        strategy, training = self.strategy, self.training
        folder = self.store.scratch(step)
        self._together(step, lambda: self.store.begin(step) if strategy.is_main else None)
        own_random = folder / f"random_{strategy.rank:05d}.pt"
        self._together(step, lambda: write_atomic(own_random, random_state()))
        try:
            values, future = strategy.save_parts(folder, training.model, training.optimizer, self.background)
        except CheckpointError:
            if strategy.is_main:
                self.store.abort(step)
            raise
        run = self._describe(step, metrics, values)
        self._together(step, lambda: write_atomic(folder / RUN, run) if strategy.is_main else None)
        if future is None:
            self._together(step, partial(self._commit, step, metrics))
        else:
            self.pending = (step, _then(future, partial(self._commit, step, metrics)))

    def wait(self) -> None:
        """Block until background writes finish. Raises CheckpointError if one failed, on any rank."""
        if self.pending is not None:
            (step, future), self.pending = self.pending, None
            self._together(step, future.result)

    def load(self, path: Path) -> tuple[int, Metrics]:
        """Restore the run from a checkpoint, including the random states of this process.

        Returns:
            The number of updates made, and the metrics saved with them.

        Raises:
            CheckpointError: a damaged checkpoint, or one of another model, optimizer, seed or text.
        """
        training = self.training
        if path.is_file():
            raise CheckpointError(
                f"cannot resume from {path}: an exported file holds no optimizer state and no place in "
                "the data"
            )
        if problem := self.strategy.agree(damage(path) if self.strategy.is_main else None):
            self._refuse(path, problem)
        run = read_run(path)
        check_same_run(run, path, training.config, training.tokenizer, training.text)
        options = read_options(training.optimizer)
        self.strategy.load_parts(path, training.model, training.optimizer, run["optimizer"])
        write_options(training.optimizer, options)  # of `train.resume_with`; all others are as saved
        if self.strategy.any(not _is_finite(training.model)):
            self._refuse(path, f"checkpoint {path} has weights that are not finite")
        try:
            training.loader.load_state_dict(run["loader"])
        except ValueError as error:
            raise CheckpointError(f"cannot resume from {path}: {error}") from error
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"{path / RUN}: no position in the data: {cause(error)}") from error
        own = f"random_{self.strategy.rank:05d}.pt"
        if own in read_manifest(path):  # there may be more ranks now
            _restore_random_state(path / own)
        return run["step"], run["metrics"]

    def _refuse(self, path: Path, problem: str) -> NoReturn:
        """Refuse to resume from a checkpoint and name one that can be used. All ranks call this."""
        other = self.strategy.agree(other_whole(path) if self.strategy.is_main else None)
        advice = f"; train.resume={other} resumes from the newest whole one" if other else ""
        raise CheckpointError(problem + advice)

    def _describe(self, step: int, metrics: Metrics, values: dict[str, Any]) -> dict[str, Any]:
        """Everything but tensors and random states, as plain values."""
        training = self.training
        return {
            "version": VERSION,
            "step": step,
            "strategy": self.strategy.name,
            "world_size": self.strategy.world_size,
            "optimizer": values,
            "loader": training.loader.state_dict(),
            "tokenizer": training.tokenizer.state(),
            "config": training.config.to_dict(),
            "text": training.text,
            "metrics": metrics,
        }

    def _commit(self, step: int, metrics: Metrics) -> None:
        if self.strategy.is_main:
            self.store.commit(step, metrics)

    def _together(self, step: int, action: Callable[[], object]) -> None:
        """Run `action` on every rank. If it fails on one, clean up and raise on all."""
        failure: Exception | None = None
        try:
            action()
        except Exception as error:
            failure = error
        if not self.strategy.any(failure is not None):
            return
        if self.strategy.is_main:
            self.store.abort(step)
        reason = failure or "another rank failed, see its message"
        latest = self.store.latest() or "none"
        raise CheckpointError(f"cannot write the checkpoint of step {step}: {reason}; the last one: {latest}")


def _then(future: Future[Any], action: Callable[[], None]) -> Future[None]:
    """A future that is done once `future` is done and `action` has run after it, in the same thread."""
    done: Future[None] = Future()

    def finish(written: Future[Any]) -> None:
        try:
            written.result()
            action()
        except BaseException as error:  # torch's CheckpointException is no Exception
            done.set_exception(CheckpointError(cause(error)))
        else:
            done.set_result(None)

    future.add_done_callback(finish)
    return done


def _is_finite(model: nn.Module) -> bool:
    """Whether all parameters, or this rank's shards of them, are finite."""
    sharded: Any = model.parameters()
    parts = (p.to_local() if is_sharded(p) else p for p in sharded)
    return all(bool(torch.isfinite(part).all()) for part in parts if part.is_floating_point())


def _restore_random_state(path: Path) -> None:
    state = read_plain(path)
    try:
        set_random_state(state)
    except (*WRONG_VALUES, RuntimeError) as error:
        raise CheckpointError(f"{path} holds no random states: {cause(error)}") from error
