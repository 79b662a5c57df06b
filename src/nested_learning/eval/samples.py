"""The log of the samples of an evaluation, from which an interrupted evaluation is resumed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol, TextIO, TypeVar

from nested_learning.lock import LOCK, locked
from nested_learning.log_lines import Row, read_log
from nested_learning.progress import progress_bar
from nested_learning.train.checkpoint import write_atomic

Sample = TypeVar("Sample")


class Samples(Protocol[Sample]):
    """Samples and how they are scored; every `Evaluation` is an example."""

    @property
    def items(self) -> Sequence[tuple[str, Sample]]:
        """The samples, each with a key of its own. Keys that the log holds are not scored again."""
        ...

    @property
    def at_once(self) -> int:
        """Number of samples that are scored together."""
        ...

    def score(self, items: Sequence[Sample]) -> list[Row]:
        """A row of JSON values for each sample."""
        ...

    def replay(self, item: Sample) -> None:
        """Catch up with a sample that is not scored again, for state that samples hand on to the next."""
        ...


def samples_path(output: Path) -> Path:
    """The log of samples beside a result file."""
    return output.with_suffix(".samples.jsonl")


def score_samples(
    log_path: Path,
    settings: Mapping[str, Any],
    samples: Samples[Sample],
    description: str = "",
) -> list[Row]:
    """Score samples and log every finished one, so that a killed evaluation can be resumed.

    Batches are the same after an interruption: if the log lacks one sample of a batch, the whole batch is
    scored again, so that not even rounding differs.

    Args:
        log_path: a JSON-lines file: the settings, then `{"key", "result"}` per sample. A last line cut short
            by a kill is removed from it.
        settings: everything that a sample's row depends on, as JSON values.
        samples: the samples and how they are scored.
        description: label of the progress bar.

    Returns:
        Rows in the order of the samples, as read back from JSON.

    Raises:
        InUseError: another process writes to the log.
        ValueError: the log was made with other settings, or two samples have the same key.
    """
    if len({key for key, _ in samples.items}) != len(samples.items):
        raise ValueError("every item needs a key of its own")
    with _locked_log(log_path):
        done = _open_log(log_path, settings)
        _score_missing(log_path, samples, done, description)
        return [done[key] for key, _ in samples.items]


def _score_missing(log_path: Path, samples: Samples[Sample], done: dict[str, Row], description: str) -> None:
    """Score the batches of which `done` lacks a sample, and replay the others."""
    finished = sum(key in done for key, _ in samples.items)
    bar = progress_bar(total=len(samples.items), initial=finished, desc=description, unit="sample")
    with bar, log_path.open("a", encoding="utf-8") as log:
        for first in range(0, len(samples.items), samples.at_once):
            batch = samples.items[first : first + samples.at_once]
            missing = [key for key, _ in batch if key not in done]
            if not missing:
                for _, item in batch:
                    samples.replay(item)
                continue
            for (key, _), row in zip(batch, samples.score([item for _, item in batch]), strict=True):
                if key not in done:
                    done[key] = _append(log, key, row)
            bar.update(len(missing))


def _append(log: TextIO, key: str, row: Row) -> Row:
    """Append a row to the log, and return it as it will be read back."""
    line = json.dumps({"key": key, "result": row}, allow_nan=False)
    log.write(line + "\n")
    log.flush()
    read: Row = json.loads(line)["result"]
    return read


def start_fresh(log_path: Path) -> None:
    """Delete the log of an earlier evaluation (`--fresh`).

    Raises:
        InUseError: that evaluation is still running.
    """
    with _locked_log(log_path):
        log_path.unlink(missing_ok=True)


def _locked_log(path: Path) -> AbstractContextManager[None]:
    return locked(path.with_name(path.name + LOCK), f"log of samples {path}")


def _open_log(path: Path, settings: Mapping[str, Any]) -> dict[str, Row]:
    """Rows of the finished samples by key. Begins the log if there is none."""
    wanted = json.loads(json.dumps(settings, allow_nan=False))
    lines, whole = read_log(path)
    if not lines and whole:
        write_atomic(path, (json.dumps({"settings": wanted}) + "\n").encode())
        return {}
    settings_line = lines[0].get("settings") if lines else None
    if settings_line != wanted:
        raise ValueError(
            f"{path} holds samples of another evaluation ({_difference(settings_line, wanted)}); "
            "give another --output, or --fresh to forget them"
        )
    if any("key" not in line or "result" not in line for line in lines[1:]):
        raise ValueError(f"{path} is no log of samples; give another --output, or --fresh to forget it")
    if not whole:
        write_atomic(path, "".join(json.dumps(line) + "\n" for line in lines).encode())
    return {line["key"]: line["result"] for line in lines[1:]}


def _difference(old: Any, new: dict[str, Any]) -> str:
    if not isinstance(old, dict):
        return "not a log of samples"
    keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    return "; ".join(f"{key} was {old.get(key)!r}, is {new.get(key)!r}" for key in keys)
