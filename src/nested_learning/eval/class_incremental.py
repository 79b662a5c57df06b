"""Class-incremental learning: new classes task after task, and after each a test on all classes seen so far.

Task-free: every class seen so far is a candidate for every text, as nobody tells which task it belongs to.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from nested_learning.checks import within
from nested_learning.eval.forgetting import forgetting
from nested_learning.eval.intents import Example, Task
from nested_learning.eval.learners import ClassMeans, FineTuned, FineTuning, InContext, Learner, Memorizing
from nested_learning.eval.loading import Loaded
from nested_learning.eval.memorize import Memorize
from nested_learning.eval.plots import draw_accuracies
from nested_learning.eval.results import (
    BASELINE,
    Metric,
    Result,
    Row,
    evaluate_samples,
    proportion,
    read_result,
    samples_path,
    versions,
    write_result,
)
from nested_learning.optim.config import OptimConfig

METHODS = ("naive", "replay", "ewc", "means", "in_context")
MEMORIZE = "memorize"


@dataclass(frozen=True, kw_only=True, slots=True)
class Protocol:
    """What is learned by whom.

    Args:
        methods: of `METHODS`.
        task_aware: only the classes of a text's own task are candidates, which is easier.
        lr, epochs, batch_size: of fine-tuning (AdamW).
        replay, memory_per_class: part of a batch from earlier tasks, and examples kept of each class.
        ewc: strength of elastic weight consolidation.
        shrink: of the covariance of "means".
        context_tokens: examples that "in_context" reads.
        seed: of fine-tuning.
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

    def __post_init__(self) -> None:
        if unknown := [name for name in self.methods if name not in METHODS]:
            raise ValueError(f"methods must be of {', '.join(METHODS)}, got {unknown[0]!r}")
        within("class_incremental.lr", self.lr, "(0, 1]")

    def learners(self, loaded: Loaded, memorize: Memorize | None) -> dict[str, Callable[[], Learner]]:
        """How to make the learner of every method; made when needed, as some hold a copy of the model."""
        naive = FineTuning(
            optim=OptimConfig(lr=self.lr, weight_decay=0.0, warmup_steps=5),
            epochs=self.epochs,
            batch_size=self.batch_size,
            memory_per_class=self.memory_per_class,
            seed=self.seed,
        )
        made: dict[str, Callable[[], Learner]] = {
            "naive": lambda: FineTuned(loaded, naive),
            "replay": lambda: FineTuned(loaded, replace(naive, replay=self.replay)),
            "ewc": lambda: FineTuned(loaded, replace(naive, ewc=self.ewc)),
            "means": lambda: ClassMeans(loaded, self.shrink),
            "in_context": lambda: InContext(loaded, self.context_tokens),
        }
        chosen = {name: made[name] for name in self.methods}
        return chosen if memorize is None else {**chosen, MEMORIZE: lambda: Memorizing(loaded, memorize)}


class Course:
    """One learner at a time through the tasks, as far as a test needs it."""

    def __init__(
        self, tasks: Sequence[Task], learners: Mapping[str, Callable[[], Learner]], task_aware: bool
    ) -> None:
        self.tasks = tasks
        self.learners = learners
        self.task_aware = task_aware
        self._name, self._learned = "", 0
        self._learner: Learner | None = None

    def test(self, item: tuple[str, int]) -> Row:
        """Right answers (1 or 0) of a method after learning task number `stage`, by task."""
        name, stage = item
        learner = self._advance(name, stage)
        seen = self.tasks[: stage + 1]
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

    def _advance(self, name: str, stage: int) -> Learner:
        if self._learner is None or name != self._name or stage + 1 < self._learned:
            self._name, self._learned, self._learner = name, 0, self.learners[name]()
        for task in self.tasks[self._learned : stage + 1]:
            self._learner.learn(task.train)
        self._learned = stage + 1
        return self._learner


def evaluate_class_incremental(
    loaded: Loaded, tasks: Sequence[Task], protocol: Protocol, output: Path, memorize: Memorize | None = None
) -> Result:
    """Accuracy of every method after every task, on the test examples of all classes seen so far.

    Args:
        tasks: of `intents.split_tasks`.
        output: the result file; `.samples.jsonl` and `.png` go beside it. Interrupted, the same call goes on
            (a method that is not finished learns its tasks again).
        memorize: also by a model that reads the examples and learns.
    """
    settings = {
        **asdict(protocol),
        "tasks": [list(task.classes) for task in tasks],
        "examples": _digest(tasks),
        "checkpoint": loaded.sha256,
        "memorize": None if memorize is None else memorize.settings(),
    }
    learners = protocol.learners(loaded, memorize)
    course = Course(tasks, learners, protocol.task_aware)
    items = [(f"{name} {stage}", (name, stage)) for name in learners for stage in range(len(tasks))]
    rows = evaluate_samples(samples_path(output), settings, items, course.test, "class-incremental")
    by_method = {
        name: [row["right"] for (_, (own, _)), row in zip(items, rows, strict=True) if own == name]
        for name in learners
    }
    metrics = [metric for name, right in by_method.items() for metric in method_metrics(name, right, tasks)]
    result = Result(
        evaluation="class_incremental",
        checkpoint=loaded.describe(),
        settings=settings,
        versions=versions(),
        metrics=metrics,
        samples=sum(len(part) for row in rows for part in row["right"]),
    )
    write_result(output, result)
    curves = {name: [_share(stage) for stage in right] for name, right in by_method.items()}
    draw_accuracies(curves, [_classes(tasks, i) for i in range(len(tasks))], output.with_suffix(".png"))
    return read_result(output)


def method_metrics(name: str, right: list[list[list[int]]], tasks: Sequence[Task]) -> list[Metric]:
    """Accuracy after every task, with chance among all classes so far; with several tasks, forgetting.

    Args:
        right: `[stages][tasks so far][examples]`.
    """
    arm = "adapted" if name == MEMORIZE else BASELINE
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


def _classes(tasks: Sequence[Task], stage: int) -> int:
    return sum(len(task.classes) for task in tasks[: stage + 1])


def _share(parts: list[list[int]]) -> float:
    flat = [value for part in parts for value in part]
    return sum(flat) / len(flat)


def _digest(tasks: Sequence[Task]) -> str:
    plain: list[list[Sequence[Example]]] = [[task.train, task.test] for task in tasks]
    return hashlib.sha256(json.dumps(plain).encode()).hexdigest()


def describe(tasks: Sequence[Task]) -> dict[str, Any]:
    """Sizes of the tasks, for the screen."""
    train, test = (
        sum(len(part) for part in parts) for parts in ([t.train for t in tasks], [t.test for t in tasks])
    )
    return {"tasks": len(tasks), "classes": _classes(tasks, len(tasks) - 1), "train": train, "test": test}
