"""Text that the kept checkpoints of a run write after one prompt, with one seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from nested_learning.reporting.run import RunRecord, step_of
from nested_learning.train.checkpoint import CheckpointError, load_checkpoint
from nested_learning.train.launch import write_sample

MOST = 6
DEFAULT_TOKENS = 64  # for runs that write no sample themselves


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """What a checkpoint wrote, or why it could not.

    Args:
        step: of the checkpoint.
        text: prompt and continuation; None if it could not be read.
        problem: the reason, "" if there is a text.
    """

    step: int
    text: str | None
    problem: str = ""


def write_samples(record: RunRecord, most: int = MOST) -> list[Sample]:
    """A sample per kept checkpoint, oldest first; of more than `most`, some that are evenly apart.

    The prompt, the number of tokens (64 if the run asks for none) and the seed are those of the run, so that
    the last one is its `sample.txt`.
    """
    return [_write(folder) for folder in spread(record.checkpoints, most)]


def _write(folder: Path) -> Sample:
    try:
        model, tokenizer, config = load_checkpoint(folder)
    except (CheckpointError, OSError) as error:  # of a running process that deletes it, or damaged
        return Sample(step=step_of(folder), text=None, problem=" ".join(str(error).split()))
    tokens = config.train.sample_tokens or DEFAULT_TOKENS
    config = replace(config, train=replace(config.train, sample_tokens=tokens))
    return Sample(step=step_of(folder), text=write_sample(config, model, tokenizer))


def spread(folders: Sequence[Path], most: int) -> list[Path]:
    """At most `most` of `folders`, evenly apart, the first and the last among them."""
    if len(folders) <= most:
        return list(folders)
    last = len(folders) - 1
    return [folders[round(number * last / (most - 1))] for number in range(most)]
