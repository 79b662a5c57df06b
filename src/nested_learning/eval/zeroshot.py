"""Zero-shot multiple choice: the likeliest answer, by its log-likelihood as it is ("acc") and per character
("acc_norm"), with the prompts and the scoring of lm-eval.

With memorizing, every question is scored twice: by the model as it was trained, and by the model after it has
read and learned what the question shows (see `eval.memorize`). Then the question is asked in a new context.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nested_learning.checks import one_of
from nested_learning.eval.loading import Loaded
from nested_learning.eval.memorize import Memorize
from nested_learning.eval.questions import CHOICES, CONTEXTS, TASKS, Question, read_questions
from nested_learning.eval.results import (
    BASELINE,
    Metric,
    Result,
    Row,
    evaluate_batches,
    proportion,
    samples_path,
    start_fresh,
    versions,
    write_result,
)
from nested_learning.eval.scorer import POLICIES, Score, Scorer

QUESTIONS_AT_ONCE = 16  # questions whose answers are sorted into batches together, and then logged


@dataclass(frozen=True, kw_only=True, slots=True)
class ZeroShot:
    """What to evaluate.

    Args:
        tasks: names in `TASKS`.
        local_dir: a folder with files of the tasks; None = the hub, through lm-eval.
        max_samples: the first so many questions of every task; None = all.
        batch_size: answers scored together.
        policy: "fresh": every question begins anew; "carried": all questions, without their answers, are one
            stream in their order (see `Scorer`).
        memorize: how the model learns; None = it does not.
    """

    tasks: tuple[str, ...] = tuple(TASKS)
    local_dir: Path | None = None
    max_samples: int | None = None
    batch_size: int = 8
    policy: str = "fresh"
    memorize: Memorize | None = None

    def __post_init__(self) -> None:
        for task in self.tasks:
            one_of("--tasks", task, (*TASKS, "all"))
        if self.max_samples is not None and self.max_samples < 1:
            raise ValueError(f"max_samples must be at least 1, got {self.max_samples}")
        if self.memorize is not None and self.policy != "fresh":
            raise ValueError(f"policy must be fresh with memorizing, got {self.policy!r}")

    def settings(self) -> dict[str, Any]:
        """For the result file and the log."""
        return {
            "tasks": list(self.tasks),
            "local_dir": None if self.local_dir is None else str(self.local_dir),
            "max_samples": self.max_samples,
            "batch_size": self.batch_size,
            "state": self.policy,
            "memorize": self.memorize.settings() if self.memorize else None,
        }


def evaluate_zeroshot(loaded: Loaded, plan: ZeroShot, output: Path, fresh: bool = False) -> Result:
    """Score a checkpoint on tasks and write `output`, with the log of its samples beside it.

    Args:
        loaded: the checkpoint.
        plan: what to evaluate.
        output: the result file; what an interrupted evaluation has finished is taken from its log.
        fresh: forget that log.

    Raises:
        FileNotFoundError, ValueError: see `read_questions` and `evaluate_batches`.
    """
    log = samples_path(output)
    if fresh:
        start_fresh(log)
    questions = {task: read_questions(task, plan.local_dir, plan.max_samples) for task in plan.tasks}
    settings = {"evaluation": "zeroshot", "checkpoint": loaded.sha256, **plan.settings()}
    judge = Judge(loaded, plan)
    items = [(f"{task}/{i}", q) for task, asked in questions.items() for i, q in enumerate(asked)]
    rows = evaluate_batches(log, settings, items, judge.answer, QUESTIONS_AT_ONCE, "zero-shot", judge.replay)
    metrics, first = [], 0
    for task, asked in questions.items():
        metrics += task_metrics(task, asked, rows[first : first + len(asked)], plan.memorize)
        first += len(asked)
    packages = () if plan.local_dir is not None else ("lm-eval",)
    result = Result(
        evaluation="zeroshot",
        checkpoint=loaded.describe(),
        settings=plan.settings(),
        versions=versions(*packages),
        metrics=metrics,
        samples=len(items),
    )
    write_result(output, result)
    return result


class Judge:
    """Scores questions by a model, and by one that memorizes; keeps what is carried between questions."""

    def __init__(self, loaded: Loaded, plan: ZeroShot) -> None:
        self.loaded, self.memorize, self.carried = loaded, plan.memorize, None
        model, tokenizer, size = loaded.model, loaded.tokenizer, plan.batch_size
        self.scorer = Scorer(model, tokenizer, size, plan.policy, device=loaded.device)
        self.adapted = Scorer(model, tokenizer, size, device=loaded.device)

    def answer(self, questions: Sequence[Question]) -> list[Row]:
        """For every question its rows by arm: log-likelihoods, what was chosen, what is right."""
        scores = self.scorer.loglikelihood([pair for q in questions for pair in q.pairs])
        rows: list[Row] = []
        for question in questions:
            own, scores = scores[: len(question.pairs)], scores[len(question.pairs) :]
            row: Row = {"gold": question.gold, BASELINE: choose(question, own)}
            if self.memorize is not None:
                self.adapted.start = self.learn(question, self.memorize)
                row[self.memorize.arm] = choose(question, self.adapted.loglikelihood(question.pairs))
            rows.append(row)
        return rows

    def learn(self, question: Question, how: Memorize) -> Any:
        """Read a question and learn from it: what is remembered, at the start of a new context."""
        text = question.solved if how.use_correct_answer else question.shown
        ids = self.loaded.tokenizer.encode(text) or [self.loaded.tokenizer.eos_id]
        state = how.read(self.loaded.model, torch.tensor([ids], device=self.loaded.device), self.carried)
        self.carried = how.carried(self.loaded.model, state)
        return how.memory(self.loaded.model, state)

    def replay(self, question: Question) -> None:
        """Read or learn again what a question that was scored before an interruption leaves for the next."""
        self.scorer.replay(question.pairs)
        if self.memorize is not None and not self.memorize.adapt.reset:
            self.learn(question, self.memorize)


def choose(question: Question, scores: Sequence[Score]) -> Row:
    """Log-likelihoods of the answers, and which is the likeliest; of equals the first."""
    values = [value for value, _ in scores]
    per_character = [v / max(len(a), 1) for v, a in zip(values, question.answers, strict=True)]
    return {
        "loglikelihoods": values,
        "chosen": values.index(max(values)),
        "chosen_norm": per_character.index(max(per_character)),
    }


def task_metrics(
    task: str, questions: Sequence[Question], rows: Sequence[Row], memorize: Memorize | None
) -> list[Metric]:
    """Accuracies of a task, by arm. Chance is that of guessing evenly among the answers of each question."""
    chance = sum(1 / len(q.pairs) for q in questions) / len(questions)
    kinds = [("acc", "chosen"), ("acc_norm", "chosen_norm")][: 2 if TASKS[task].normalized else 1]
    return [
        proportion(task, name, sum(row[arm][key] == row["gold"] for row in rows), len(rows), chance, arm)
        for arm in (BASELINE, *((memorize.arm,) if memorize else ()))
        for name, key in kinds
    ]


def add_options(parser: argparse.ArgumentParser) -> None:
    """What `ZeroShot` is made of, without memorizing."""
    add = parser.add_argument
    add("--tasks", default="all", help="names with commas between them, or all; others are lm-eval's own")
    add("--list-tasks", action="store_true", help="names and fields of the tasks")
    add("--local-dir", type=Path, help="folder with TASK.jsonl, .json or .parquet; default: the hub")
    add("--max-samples", type=int, help="the first so many questions of every task")
    add("--state", choices=POLICIES, default="fresh", help="carried: the questions are one stream of text")
    add("--batch-size", type=int, default=8, help="answers scored together (default 8)")


def list_tasks() -> str:
    """The tasks, a line each."""
    lines = [
        f"{name:14} {task.split:11} {', '.join(task.fields)}  ({task.choices or 'several'} choices)"
        for name, task in TASKS.items()
    ]
    others = " or ".join(", ".join(fields) for fields in (CHOICES, CONTEXTS))
    return "\n".join(
        [
            *lines,
            f"records of --local-dir may instead have {others}",
            "any other name is a task of lm-eval (its data from the hub)",
        ]
    )
