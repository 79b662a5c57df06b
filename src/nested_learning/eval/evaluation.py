"""The steps that every evaluation shares: score samples, log them, write a result file, and draw.

    evaluate(Niah(loaded, grid), Path("niah.json"))  # resumes if niah.samples.jsonl is there

An evaluation is a subclass of `Evaluation`: its samples, how a model scores on them, and the metrics that
follow from the scores.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol

from nested_learning.eval.arms import BASELINE, Memorize, arms_of
from nested_learning.eval.loading import Loaded
from nested_learning.eval.results import (
    EvaluationResult,
    Metric,
    check_output,
    read_result,
    versions,
    write_result,
)
from nested_learning.eval.samples import Sample, samples_path, score_samples, start_fresh
from nested_learning.log_lines import Row


class Settings(Protocol):
    """What the settings of all evaluations have: how the model learns in the adapted arm.

    None stands for the baseline only.
    """

    @property
    def memorize(self) -> Memorize | None:
        """How the model learns."""
        ...


class Evaluation(ABC, Generic[Sample]):
    """A checkpoint under one kind of test, with the state that its samples hand on to each other.

    Args:
        loaded: the checkpoint.
        given: the settings, a dataclass with a field `memorize`.
        items: the samples, each with a key of its own.

    Attributes:
        name: name of the evaluation in its result file.
        at_once: number of samples that are scored together.
        packages: installed packages whose versions belong in the result.
    """

    name: ClassVar[str]
    at_once: int = 1
    packages: tuple[str, ...] = ()

    def __init__(self, loaded: Loaded, given: Settings, items: Sequence[tuple[str, Sample]]) -> None:
        self.loaded = loaded
        self.given = given
        self.items = items
        self.memorize = given.memorize

    @property
    def arms(self) -> list[str]:
        """Names of the arms."""
        return arms_of(self.memorize)

    def settings(self) -> dict[str, Any]:
        """Everything that the numbers depend on, as JSON values for the result file."""
        found: dict[str, Any] = as_json(self.given)
        return found

    @abstractmethod
    def score(self, items: Sequence[Sample]) -> list[Row]:
        """Score a batch of samples in every arm: a row of JSON values for each."""

    @abstractmethod
    def metrics(self, rows: Sequence[Row]) -> list[Metric]:
        """The numbers of the result, from the rows of all samples in the order of `items`."""

    def replay(self, item: Sample) -> None:
        """Catch up with a sample that was scored before an interruption: learn what it hands on."""
        if self.memorize is not None and not self.memorize.adapt.reset:
            self.learn(item)

    def learn(self, item: Sample) -> Any:
        """Learn from a sample, as `score` does in the adapted arm."""

    def draw(self, rows: Sequence[Row], result: EvaluationResult, output: Path) -> None:
        """Draw figures beside the result file `output`; not every evaluation has one."""

    def checkpoint(self) -> dict[str, str]:
        """The checkpoint as it stands in the result file."""
        return self.loaded.describe()

    def log_settings(self) -> dict[str, Any]:
        """What the first line of the log holds; a log with another first line is not resumed."""
        return {"evaluation": self.name, "checkpoint": self.loaded.sha256, **self.settings()}

    def count(self, rows: Sequence[Row]) -> int:
        """Number of samples, for the result file."""
        return len(rows)

    def rows(self, output: Path, fresh: bool) -> list[Row]:
        """Rows of all samples; what the log beside `output` holds is not scored again unless `fresh`."""
        log = samples_path(output)
        if fresh:
            start_fresh(log)
        return score_samples(log, self.log_settings(), self, self.name)


def evaluate(evaluation: Evaluation[Any], output: Path, fresh: bool = False) -> EvaluationResult:
    """Run an evaluation and write its result file, with the log of its samples and its figures beside it.

    If it is interrupted, the same call resumes it.

    Args:
        evaluation: a checkpoint under a test.
        output: the result file, `.json`.
        fresh: whether to forget the samples that an earlier call has scored.

    Returns:
        The result as read back from the file.

    Raises:
        InUseError: another process writes to the log.
        ValueError: another suffix than `.json`, or a log of other settings.
    """
    check_output(output)
    rows = evaluation.rows(output, fresh)
    result = EvaluationResult(
        evaluation=evaluation.name,
        checkpoint=evaluation.checkpoint(),
        settings=evaluation.settings(),
        versions=versions(*evaluation.packages),
        metrics=evaluation.metrics(rows),
        samples=evaluation.count(rows),
    )
    write_result(output, result)
    evaluation.draw(rows, result, output)
    return read_result(output)


def as_json(value: Any) -> Any:
    """A settings dataclass, or a value of one, as JSON values: paths become texts, tuples lists."""
    if isinstance(value, Memorize):
        return value.settings()
    if is_dataclass(value):
        return {field.name: as_json(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, tuple | list):
        return [as_json(part) for part in value]
    return str(value) if isinstance(value, Path) else value


def figure_path(output: Path, arm: str) -> Path:
    """The figure of an arm beside a result file."""
    return output.with_suffix(".png" if arm == BASELINE else ".adapted.png")
