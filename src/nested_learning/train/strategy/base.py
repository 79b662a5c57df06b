"""What the trainer asks of a strategy, and the simplest one: one process, one device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nested_learning.train.checkpoint.tensors import load_tensors, pack, write_tensors

T = TypeVar("T")
CPU = torch.device("cpu")


class Strategy:
    """Runs a training on one or several devices. What stands here is right for one process.

    A loss is always divided by the number of targets of the whole step, over all micro-batches and ranks,
    and gradients are summed, so the update does not depend on how the batch is split.

    Args:
        device: where the model is.
    """

    name: str
    rank = 0
    local_rank = 0
    world_size = 1
    shards_parameters = False

    def __init__(self, device: torch.device = CPU) -> None:
        self.device = device

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files of the run and prints."""
        return self.rank == 0

    def prepare(
        self, model: nn.Module, make_optimizer: Callable[[nn.Module], Optimizer]
    ) -> tuple[nn.Module, Optimizer]:
        """The module to call in training, and the optimizer. Checkpoints are made of `model` itself."""
        return model, make_optimizer(model)

    @contextmanager
    def micro_step(self, last: bool) -> Iterator[None]:
        """Encloses the passes of a micro-batch. Only the last one of a step reduces gradients."""
        yield

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of this rank's part of the loss."""
        loss.backward()  # type: ignore[no-untyped-call]

    def clip(self, model: nn.Module, max_norm: float | None) -> Tensor:
        """Global norm of the gradient, a scalar. Scales gradients down to `max_norm` unless it is None."""
        limit = float("inf") if max_norm is None else max_norm
        return torch.nn.utils.clip_grad_norm_(model.parameters(), limit)

    def sum(self, value: Tensor) -> Tensor:
        """`value` summed over all ranks."""
        return value

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set on any rank."""
        return flag

    def agree(self, value: T) -> T:
        """The main rank's `value`, on every rank."""
        return value

    def on_main(self, action: Callable[[], T]) -> T:
        """Run `action` on the main rank. Its result is returned, or its error raised, on every rank."""
        return action()

    def first(self, value: T | None) -> T | None:
        """The `value` of the lowest rank that has one, on every rank; None if none has."""
        return value

    def barrier(self) -> None:
        """Wait for all ranks."""

    @contextmanager
    def local_main_first(self) -> Iterator[None]:
        """The body runs in the first process of every machine, and after it in the others."""
        yield

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Inside, a failure that comes from another rank is reported with that rank's number."""
        yield

    def saved_tensors(self, model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
        """The tensors that `save_parts` writes, by key: this rank's part, without copies."""
        return pack(model, optimizer)[0]

    def save_parts(
        self, folder: Path, model: nn.Module, optimizer: Optimizer, background: bool
    ) -> tuple[dict[str, Any], Future[Any] | None]:
        """Write weights and optimizer state to `folder`, every rank its part.

        Returns:
            Plain values to save with them, and a future if they are written in the background.
        """
        tensors, values = pack(model, optimizer)
        return values, write_tensors(folder, tensors, background=background)

    def load_parts(
        self, folder: Path, model: nn.Module, optimizer: Optimizer, values: dict[str, Any]
    ) -> None:
        """Load what `save_parts` wrote. Raises CheckpointError if the checkpoint does not fit."""
        load_tensors(folder, model, optimizer, values)

    def close(self) -> None:
        """Leave the group of processes."""


class OneProcess(Strategy):
    """One process on one device."""

    name = "single"
