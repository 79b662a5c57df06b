"""The steps that every evaluation shares: score samples, log them, write a result file, and draw.

    evaluate(Niah(loaded, grid), Path("niah.json"))  # resumes if niah.samples.jsonl is there

An evaluation is a subclass of `Evaluation`: its samples, how a model scores on them, and the metrics that
follow from the scores.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic

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
from nested_learning.eval.samples import Item, samples_path, score_samples, start_fresh
from nested_learning.log_lines import Row


class Evaluation(ABC, Generic[Item]):
    """A checkpoint under one kind of test, with the state that its samples hand on to each other.

    Args:
        loaded: the checkpoint.
        items: the samples, each with a key of its own.
        memorize: how the model learns in the adapted arm; None = the baseline only.

    Attributes:
        name: name of the evaluation in its result file.
        at_once: number of samples that are scored together.
        packages: installed packages whose versions belong in the result.
    """

    name: ClassVar[str]
    at_once: int = 1
    packages: tuple[str, ...] = ()

    def __init__(
        self, loaded: Loaded, items: Sequence[tuple[str, Item]], memorize: Memorize | None = None
    ) -> None:
        self.loaded = loaded
        self.items = items
        self.memorize = memorize

    @property
    def arms(self) -> list[str]:
        """Names of the arms."""
        return arms_of(self.memorize)

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Everything that the numbers depend on, as JSON values for the result file."""

    @abstractmethod
    def score(self, items: Sequence[Item]) -> list[Row]:
        """Score a batch of samples in every arm: a row of JSON values for each."""

    @abstractmethod
    def metrics(self, rows: Sequence[Row]) -> list[Metric]:
        """The numbers of the result, from the rows of all samples in the order of `items`."""

    def replay(self, item: Item) -> None:
        """Catch up with a sample that was scored before an interruption: learn what it hands on."""
        if self.memorize is not None and not self.memorize.adapt.reset:
            self.learn(item)

    def learn(self, item: Item) -> Any:
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


def figure_path(output: Path, arm: str) -> Path:
    """The figure of an arm beside a result file."""
    return output.with_suffix(".png" if arm == BASELINE else ".adapted.png")
