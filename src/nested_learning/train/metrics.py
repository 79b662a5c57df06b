"""Where numbers go: a JSON-lines file, W&B, or both."""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch

if TYPE_CHECKING:
    from nested_learning.config import RunConfig

Record = dict[str, float]
T = TypeVar("T")


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
        path.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        self.file = path.open("a", encoding="utf-8")

    def write(self, record: Record) -> None:
        """Append `record` as one line."""
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()

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
    """The writers of a run: `metrics.jsonl` in its directory, and W&B if the configuration asks for it.

    Ranks other than the main one have none.
    """
    if not is_main:
        return FanOut([])
    writers: list[Writer] = [JsonLinesWriter(config.run_dir / "metrics.jsonl", resume_step)]
    if config.logging.wandb != "none":
        writers.append(Tolerant(lambda: WandbWriter(config), "W&B"))
    return FanOut(writers)


def read_metrics(path: Path) -> list[Record]:
    """Rows of a JSON-lines file, oldest first; none if there is no file.

    A last line without its end was cut off by a kill and is left out.
    """
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def memory_gib(device: torch.device) -> float:
    """Highest memory in use so far, GiB: of the CUDA device, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)  # bytes on macOS, KiB on Linux
