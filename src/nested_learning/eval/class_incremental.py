"""Class-incremental learning: new classes task by task, and after each a test on all classes seen so far.

It is task-free: every class seen so far is a candidate for every text, as the task of a text is not given.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from nested_learning.checks import within
from nested_learning.eval.arms import ADAPTED, BASELINE, Memorize
from nested_learning.eval.evaluation import Evaluation
from nested_learning.eval.forgetting import forgetting
from nested_learning.eval.intents import ClassTask, Example
from nested_learning.eval.learners import (
    ClassLearner,
    ClassMeans,
    FineTuned,
    FineTuning,
    InContext,
    Memorizing,
)
from nested_learning.eval.loading import Loaded
from nested_learning.eval.plots import draw_accuracies
from nested_learning.eval.results import EvaluationResult, Metric, proportion
from nested_learning.log_lines import Row
from nested_learning.optim.config import OptimConfig

METHODS = ("naive", "replay", "ewc", "means", "in_context")
MEMORIZE = "memorize"
Stage = tuple[str, int]
"""A method, and the number of the task that it has just learned."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassIncrementalSettings:
    """Settings of `ClassIncremental`.

    Args:
        methods: names in `METHODS`.
        task_aware: only the classes of a text's own task are candidates, which is easier.
        lr, epochs, batch_size: of fine-tuning (AdamW).
        replay, memory_per_class: share of a batch from earlier tasks, and examples kept of each class.
        ewc: strength of elastic weight consolidation.
        shrink: shrinkage of the covariance of "means".
        context_tokens: tokens of the examples that "in_context" reads.
        seed: seed of fine-tuning.
        memorize: adds the method "memorize", a model that learns while it reads the examples; None = without.
    """

    methods: tuple[str, ...] = METHODS
    task_aware: bool = False
    lr: float = 1e-3
    epochs: int = 5
    batch_size: int = 16
    replay: float = 0.5
    memory_per_class: int = 5
    ewc: float = 100.0
    shrink: float = 0.1
    context_tokens: int = 1536
    seed: int = 0
    memorize: Memorize | None = None

    def __post_init__(self) -> None:
        if unknown := [name for name in self.methods if name not in METHODS]:
            raise ValueError(f"methods must be of {', '.join(METHODS)}, got {unknown[0]!r}")
        within("class_incremental.lr", self.lr, "(0, 1]")

    def learners(self, loaded: Loaded) -> dict[str, Callable[[], ClassLearner]]:
        """How to make the learner of every method; made when needed, as some hold a copy of the model."""
        naive = FineTuning(
            optim=OptimConfig(lr=self.lr, weight_decay=0.0, warmup_steps=5),
            epochs=self.epochs,
            batch_size=self.batch_size,
            memory_per_class=self.memory_per_class,
            seed=self.seed,
        )
        made: dict[str, Callable[[], ClassLearner]] = {
            "naive": lambda: FineTuned(loaded, naive),
            "replay": lambda: FineTuned(loaded, replace(naive, replay=self.replay)),
            "ewc": lambda: FineTuned(loaded, replace(naive, ewc=self.ewc)),
            "means": lambda: ClassMeans(loaded, self.shrink),
            "in_context": lambda: InContext(loaded, self.context_tokens),
        }
        chosen = {name: made[name] for name in self.methods}
        if self.memorize is not None:
            chosen[MEMORIZE] = partial(Memorizing, loaded, self.memorize)
        return chosen


class Course:
    """Takes one learner at a time through the tasks, as far as a test needs it."""

    def __init__(
        self,
        tasks: Sequence[ClassTask],
        learners: Mapping[str, Callable[[], ClassLearner]],
        task_aware: bool,
    ) -> None:
        self.tasks = tasks
        self.learners = learners
        self.task_aware = task_aware
        self._name, self._learned = "", 0
        self._learner: ClassLearner | None = None

    def test(self, stage: Stage) -> Row:
        """Right answers (1 or 0) of a method after a task, by task."""
        name, number = stage
        learner = self._advance(name, number)
        seen = self.tasks[: number + 1]
        every = [label for task in seen for label in task.classes]
        return {
            "right": [
                [
                    int(learner.predict(text, task.classes if self.task_aware else every) == label)
                    for text, label in task.test
                ]
                for task in seen
            ]
        }

    def _advance(self, name: str, number: int) -> ClassLearner:
        if self._learner is None or name != self._name or number + 1 < self._learned:
            self._name, self._learned, self._learner = name, 0, self.learners[name]()
        for task in self.tasks[self._learned : number + 1]:
            self._learner.learn(task.train)
        self._learned = number + 1
        return self._learner


class ClassIncremental(Evaluation[Stage]):
    """Accuracy of every method after every task, on the test examples of all classes seen so far.

    If it is interrupted, a method that has not finished learns its tasks again.

    Args:
        loaded: the checkpoint.
        tasks: from `intents.split_tasks`.
        settings: the methods.
    """

    name = "class_incremental"
    given: ClassIncrementalSettings

    def __init__(
        self, loaded: Loaded, tasks: Sequence[ClassTask], settings: ClassIncrementalSettings
    ) -> None:
        learners = settings.learners(loaded)
        items = [(f"{name} {number}", (name, number)) for name in learners for number in range(len(tasks))]
        super().__init__(loaded, settings, items)
        self.tasks = tasks
        self.course = Course(tasks, learners, settings.task_aware)

    def settings(self) -> dict[str, Any]:
        """See `Evaluation`."""
        return {
            **super().settings(),
            "tasks": [list(task.classes) for task in self.tasks],
            "examples": _digest(self.tasks),
            "checkpoint": self.loaded.sha256,
        }

    def log_settings(self) -> dict[str, Any]:
        """The settings alone: they name the checkpoint."""
        return self.settings()

    def score(self, items: Sequence[Stage]) -> list[Row]:
        """What `Course.test` returns for every stage."""
        return [self.course.test(stage) for stage in items]

    def replay(self, item: Stage) -> None:
        """Nothing: the course learns what a stage needs."""

    def metrics(self, rows: Sequence[Row]) -> list[Metric]:
        """Accuracy of every method after every task, and its forgetting."""
        by_method = self._by_method(rows)
        return [
            metric for name, right in by_method.items() for metric in method_metrics(name, right, self.tasks)
        ]

    def draw(self, rows: Sequence[Row], result: EvaluationResult, output: Path) -> None:
        """Accuracy over the number of classes seen so far."""
        curves = {name: [_share(parts) for parts in right] for name, right in self._by_method(rows).items()}
        classes = [_classes(self.tasks, number) for number in range(len(self.tasks))]
        draw_accuracies(curves, classes, output.with_suffix(".png"))

    def count(self, rows: Sequence[Row]) -> int:
        """Number of test examples, over all stages."""
        return sum(len(part) for row in rows for part in row["right"])

    def _by_method(self, rows: Sequence[Row]) -> dict[str, list[list[list[int]]]]:
        """Right answers `[stages][tasks so far][examples]` by method."""
        found: dict[str, list[list[list[int]]]] = {}
        for (_, (name, _)), row in zip(self.items, rows, strict=True):
            found.setdefault(name, []).append(row["right"])
        return found


def method_metrics(name: str, right: list[list[list[int]]], tasks: Sequence[ClassTask]) -> list[Metric]:
    """Accuracy after every task, with chance among all classes so far; and forgetting, with several tasks.

    Args:
        right: `[stages][tasks so far][examples]`.
    """
    arm = ADAPTED if name == MEMORIZE else BASELINE
    metrics = []
    for stage, parts in enumerate(right):
        flat = [value for part in parts for value in part]
        count = _classes(tasks, stage)
        metrics.append(
            proportion(f"{count} classes", f"{name} accuracy", sum(flat), len(flat), 1 / count, arm)
        )
    if len(right) > 1:
        square = [[_share([part]) for part in parts] + [0.0] * (len(right) - len(parts)) for parts in right]
        lost = forgetting(square)
        metrics.append(
            Metric(task="all tasks", name=f"{name} forgetting", value=lost, n=len(right) - 1, arm=arm)
        )
    return metrics


def _classes(tasks: Sequence[ClassTask], stage: int) -> int:
    return sum(len(task.classes) for task in tasks[: stage + 1])


def _share(parts: list[list[int]]) -> float:
    flat = [value for part in parts for value in part]
    return sum(flat) / len(flat)


def _digest(tasks: Sequence[ClassTask]) -> str:
    plain: list[list[Sequence[Example]]] = [[task.train, task.test] for task in tasks]
    return hashlib.sha256(json.dumps(plain).encode()).hexdigest()


def describe(tasks: Sequence[ClassTask]) -> dict[str, Any]:
    """Numbers of tasks, classes and examples, to be printed."""
    train, test = (
        sum(len(part) for part in parts) for parts in ([t.train for t in tasks], [t.test for t in tasks])
    )
    return {"tasks": len(tasks), "classes": _classes(tasks, len(tasks) - 1), "train": train, "test": test}
