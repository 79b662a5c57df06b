"""Processes of a run, started quickly: they are forked from a server that has imported everything."""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
CONTEXT = multiprocessing.get_context("forkserver")
PRELOAD = """nested_learning.train.launch nested_learning.train.strategy.ddp
nested_learning.train.strategy.fsdp nested_learning.train.plots matplotlib.figure
matplotlib.backends.backend_agg torch._dynamo
torch.distributed.checkpoint torch.distributed.checkpoint.state_dict_saver ranks work"""
CONTEXT.set_forkserver_preload(PRELOAD.split())


class Ranks:
    """`count` processes that each call `target(*arguments)` with the environment of `torchrun`.

    `output` is what they printed, `receive(r)` what rank r returns.
    """

    def __init__(self, count: int, folder: Path, target: Callable[..., Any], *arguments: Any) -> None:
        os.environ["OMP_NUM_THREADS"] = "1"  # of the server, when it starts
        self.log, self.port = folder / "ranks.log", free_port()
        self.log.write_text("")
        self.pipes = [CONTEXT.Pipe(duplex=False) for _ in range(count)]
        self.processes = [
            CONTEXT.Process(
                target=_enter,
                args=(rank, count, self.port, str(self.log), self.pipes[rank][1], target, arguments),
            )
            for rank in range(count)
        ]
        for process, (_, theirs) in zip(self.processes, self.pipes, strict=True):
            process.start()
            theirs.close()

    def kill(self, rank: int | None = None, number: int = signal.SIGKILL) -> None:
        """Send a signal to one rank, or to all."""
        for process in self.processes if rank is None else [self.processes[rank]]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, number)

    def join(self, timeout: float = 180) -> list[int | None]:
        """Exit codes, once all have ended."""
        for process in self.processes:
            process.join(timeout)
        codes = [process.exitcode for process in self.processes]
        if None in codes:
            self.kill()
        return codes

    def receive(self, rank: int, timeout: float = 240) -> Any:
        """What `target` returns on a rank; an AssertionError if it ends without."""
        pipe = self.pipes[rank][0]
        try:
            assert pipe.poll(timeout), f"rank {rank} hangs\n{self.output}"
            return pipe.recv()
        except EOFError:
            raise AssertionError(f"rank {rank} failed\n{self.output}") from None

    @property
    def output(self) -> str:
        """Everything printed so far."""
        return self.log.read_text()


def run_ranks(count: int, folder: Path, target: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Run to the end; the results of all ranks."""
    ranks = Ranks(count, folder, target, *arguments)
    received = [ranks.receive(rank) for rank in range(count)]
    assert ranks.join() == [0] * count, ranks.output
    return received


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _enter(rank: int, count: int, port: int, log: str, pipe: Any, target: Any, arguments: Any) -> None:
    file = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    import torch

    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(100)  # where it hangs, if it does
    try:
        value = target(*arguments)
        pipe.send(value)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)  # no interpreter shutdown: quick, and like a process that has nothing left to say
