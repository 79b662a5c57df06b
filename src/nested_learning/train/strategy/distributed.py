"""Several processes: ranks, collectives, and reporting of dead ranks.

Started by `torchrun`, which sets RANK, WORLD_SIZE and LOCAL_RANK; without it, a world of one process.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore, PrefixStore, Store
from torch.distributed.rendezvous import rendezvous
from torch.optim import Optimizer

from nested_learning.runtime import pick_device
from nested_learning.train.checkpoint.tensors import pack, write_tensors
from nested_learning.train.config import RunConfig
from nested_learning.train.strategy.base import Strategy

T = TypeVar("T")
ANSWER_WITHIN = timedelta(seconds=5)
# Groups live on after they are left: DDP's reducer frees the last reference to one while it holds the
# interpreter's lock, and waits for ever if a thread of gloo then wants that lock to free its last tensor.
left_groups: list[Any] = []


class DistributedStrategy(Strategy):
    """Base of all strategies with several processes, each with its device and its rows of the batch.

    Memory states belong to rows, so they never leave their rank. The backend is gloo for CPU tensors, nccl
    for CUDA tensors. Gradients are *averaged* over ranks by DDP, FSDP and DeepSpeed alike; multiplying the
    loss by the number of ranks makes that the sum which the objective asks for.

    Raises:
        ValueError: `train.batch_size` does not divide over ranks and micro-batches.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.rank, self.world_size, self.local_rank = (
            int(os.environ.get(name, default))
            for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
        )
        _check_batch(config, self.world_size)
        super().__init__(pick_device(config.train.device, "train.device"))
        if self.device.type == "cuda" and self.device.index is None:
            self.device = pick_device(f"cuda:{self.local_rank}", f"train.device of rank {self.rank}")
        self._join(timedelta(minutes=config.parallel.timeout_minutes))
        self.saving: dist.ProcessGroup | None = None

    def _join(self, timeout: timedelta) -> None:
        backend = "gloo"
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            backend = "cpu:gloo,cuda:nccl"
        if "MASTER_ADDR" in os.environ:
            meet: dict[str, Any] = {"store": self._agent_store(timeout)} if self._restarts_alone else {}
        else:
            meet = {"store": HashStore()}
        if meet:
            meet |= {"rank": self.rank, "world_size": self.world_size}
        dist.init_process_group(backend, timeout=timeout, **meet)

    @property
    def _restarts_alone(self) -> bool:
        """Whether one agent of torchrun, on this machine, holds the store and starts all ranks."""
        shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        return shared and os.environ.get("LOCAL_WORLD_SIZE") == str(self.world_size)

    def _agent_store(self, timeout: timedelta) -> Store:
        """The agent's store, with keys of this start and this job of a sweep only.

        The store outlives both, and torch (2.13) would find the addresses of former ranks in it. Agents
        of several machines count restarts differently; there, set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1.
        """
        store = next(rendezvous("env://", timeout=timeout))[0]
        restarts, jobs = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0), len(left_groups)
        return PrefixStore(f"start_{restarts}_{jobs}", store)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of this rank's part of the loss."""
        (loss * self.world_size).backward()  # type: ignore[no-untyped-call]

    def sum(self, value: Tensor) -> Tensor:
        """`value` summed over all ranks."""
        total = value.detach().clone()
        dist.all_reduce(total)
        return total

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set on any rank."""
        return bool(self.sum(torch.tensor(int(flag))))

    def agree(self, value: T) -> T:
        """The main rank's `value`, on every rank."""
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def on_main(self, action: Callable[[], T]) -> T:
        """Run `action` on the main rank. Its result is returned, or its error raised, on every rank."""
        result: T | None = None
        error: Exception | None = None
        if self.is_main:
            try:
                result = action()
            except Exception as failure:
                error = failure
        result, error = self.agree((result, error))
        if error is not None:
            raise error
        return cast(T, result)

    def first(self, value: T | None) -> T | None:
        """The `value` of the lowest rank that has one, on every rank; None if none has."""
        values: list[T | None] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return next((found for found in values if found is not None), None)

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.sum(torch.zeros(()))

    @contextmanager
    def local_main_first(self) -> Iterator[None]:
        """See `Strategy.local_main_first`. If the body fails in the first process, the others run it too,
        so that they report the fault itself and not only the end of the first process."""
        if self.local_rank != 0:
            self.barrier()
        try:
            yield
        except Exception:
            if self.local_rank == 0:
                self.barrier()
            raise
        if self.local_rank == 0:
            self.barrier()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Inside, a failure that comes from another rank is reported with that rank's number."""
        try:
            yield
        except Exception as error:
            report_failure(self.rank, self.world_size, error)
            raise

    def save_parts(
        self, folder: Path, model: nn.Module, optimizer: Optimizer, background: bool
    ) -> tuple[dict[str, Any], Future[Any] | None]:
        """See `Strategy.save_parts`. In the background, on a process group of its own."""
        if background and self.saving is None:
            self.saving = dist.new_group(backend="gloo")
        tensors, values = pack(model, optimizer)
        return values, write_tensors(folder, tensors, self.saving, background)

    def close(self) -> None:
        """Leave the group of processes."""
        left_groups.append(dist.distributed_c10d._get_default_group())
        dist.destroy_process_group()


def _check_batch(config: RunConfig, world_size: int) -> None:
    train = config.train
    if train.batch_size % (world_size * train.accumulation):
        raise ValueError(
            f"train.batch_size must be a multiple of processes x train.accumulation = {world_size} x "
            f"{train.accumulation}, got {train.batch_size}"
        )


def report_failure(rank: int, world_size: int, error: Exception) -> None:
    """Print on stderr which ranks failed, and their errors; a killed rank has left none.

    Every rank writes its error to the common store and looks for those of the others. The lowest rank that
    still runs prints them.
    """
    store = dist.distributed_c10d._get_default_store()
    try:
        store.set(f"failure/{rank}", f"{type(error).__name__}: {error}".splitlines()[0])
        silent = [other for other in range(world_size) if not _answers(store, other)]
    except (RuntimeError, OSError):  # the store ended with the rank that held it
        silent = [0]
    if rank == min(set(range(world_size)) - set(silent), default=rank):
        for other in silent:
            print(f"rank {other} does not answer: it was killed or hangs", file=sys.stderr, flush=True)
        print(f"rank {rank} stops: {type(error).__name__}: {error}", file=sys.stderr, flush=True)


def _answers(store: Any, rank: int) -> bool:
    try:
        store.wait([f"failure/{rank}"], ANSWER_WITHIN)
    except dist.DistStoreError:
        return False
    return True
