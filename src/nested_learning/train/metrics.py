"""Where numbers go: a JSON-lines file, W&B, or both."""

from __future__ import annotations

import errno
import json
import os
import resource
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch

from nested_learning.log_lines import read_log
from nested_learning.train.checkpoint.store import write_atomic

if TYPE_CHECKING:
    from nested_learning.train.config import RunConfig

Record = dict[str, float]
T = TypeVar("T")
INIT_SECONDS = 30  # in the background
GIVE_UP_SECONDS = 10  # of waiting at the end of a run


class Writer(Protocol):
    """A place for records. Every record has a `step`."""

    def write(self, record: Record) -> None:
        """Add one record."""
        ...

    def close(self) -> None:
        """Finish; no record comes after."""
        ...


class JsonLinesWriter:
    """One JSON object a line, flushed at once.

    Args:
        path: the file; made if it is not there.
        resume_step: rows after this step are dropped first. They were written by a run that died
            after its last checkpoint, and will be written again.
    """

    def __init__(self, path: Path, resume_step: int) -> None:
        kept = [row for row in read_metrics(path) if row["step"] <= resume_step]
        write_atomic(path, "".join(json.dumps(row) + "\n" for row in kept).encode())
        self.file = path.open("ab", buffering=0)

    def write(self, record: Record) -> None:
        """Append `record` as one line. OSError if there is no room for it."""
        line = json.dumps(record).encode() + b"\n"
        try:
            written = self.file.write(line)
        except OSError as error:
            raise OSError(error.errno, error.strerror, self.file.name) from error
        if written != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self.file.name)

    def close(self) -> None:
        """Close the file."""
        self.file.close()


class WandbWriter:
    """Weights & Biases, `mode` "offline" or "online"; files go to the run directory."""

    def __init__(self, config: RunConfig) -> None:
        import wandb

        mode: Any = config.logging.wandb
        self.run: Any = wandb.init(
            project=config.logging.project,
            name=config.name,
            dir=str(config.run_dir),
            mode=mode,
            config=config.to_dict(),
            settings=wandb.Settings(init_timeout=INIT_SECONDS),
        )

    def write(self, record: Record) -> None:
        """Log `record` at its step."""
        self.run.log({key: value for key, value in record.items() if key != "step"}, step=int(record["step"]))

    def close(self) -> None:
        """Finish the W&B run."""
        self.run.finish()


class Tolerant:
    """A writer beside the training, whose failures (no network, no login) never stop it.

    The first failure is printed; from then on nothing more is written to it.

    Args:
        make: makes the writer.
        name: for the message.
    """

    def __init__(self, make: Callable[[], Writer], name: str) -> None:
        self.name = name
        self.writer: Writer | None = None
        self.writer = self._attempt(make)

    def write(self, record: Record) -> None:
        """Hand `record` on."""
        if self.writer is not None:
            self._attempt(self.writer.write, record)

    def close(self) -> None:
        """Close the writer."""
        if self.writer is not None:
            self._attempt(self.writer.close)

    def _attempt(self, action: Callable[..., T], *arguments: Any) -> T | None:
        try:
            return action(*arguments)
        except Exception as error:  # of any kind, from other people's network code
            print(f"{self.name} fails and is left out from here on: {error}", file=sys.stderr)
            self.writer = None
            return None


class Background:
    """A writer in a thread of its own, so that training never waits for it.

    Args:
        make: makes the writer; called in the thread.
        name: for messages.
        patience: seconds that `close` waits for what is still to be written.
    """

    def __init__(self, make: Callable[[], Writer], name: str, patience: float = GIVE_UP_SECONDS) -> None:
        self.name, self.patience = name, patience
        self.records: SimpleQueue[Record | None] = SimpleQueue()
        self.thread = threading.Thread(target=self._work, args=(make,), name=name, daemon=True)
        self.thread.start()

    def write(self, record: Record) -> None:
        """Hand `record` on."""
        self.records.put(record)

    def close(self) -> None:
        """Let the thread finish, for `patience` seconds."""
        self.records.put(None)
        self.thread.join(self.patience)
        if self.thread.is_alive():
            print(f"{self.name} is not done after {self.patience} s and is left out", file=sys.stderr)

    def _work(self, make: Callable[[], Writer]) -> None:
        writer = Tolerant(make, self.name)
        while (record := self.records.get()) is not None:
            writer.write(record)
        writer.close()


class FanOut:
    """Every record to every writer."""

    def __init__(self, writers: list[Writer]) -> None:
        self.writers = writers

    def write(self, record: Record) -> None:
        """Hand `record` on."""
        for writer in self.writers:
            writer.write(record)

    def close(self) -> None:
        """Close all writers."""
        for writer in self.writers:
            writer.close()


def build_writer(config: RunConfig, resume_step: int, is_main: bool = True) -> FanOut:
    """The writers of a run: `metrics.jsonl` in its directory, and the file and W&B that `logging` asks for.

    Ranks other than the main one have none.
    """
    if not is_main:
        return FanOut([])
    writers: list[Writer] = [JsonLinesWriter(config.run_dir / "metrics.jsonl", resume_step)]
    if config.logging.path is not None:
        path = Path(config.logging.path)
        path.parent.mkdir(parents=True, exist_ok=True)
        writers.append(JsonLinesWriter(path, resume_step))
    if config.logging.wandb != "none":
        writers.append(Background(lambda: WandbWriter(config), "W&B"))
    return FanOut(writers)


def read_metrics(path: Path) -> list[Record]:
    """Rows of a metrics file, oldest first, as far as they are whole; none if there is no file."""
    return read_log(path, lambda row: isinstance(row.get("step"), (int, float)))[0]


def memory_gib(device: torch.device) -> float:
    """Highest memory in use so far, GiB: of the CUDA device, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)  # bytes on macOS, KiB on Linux
