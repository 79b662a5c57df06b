"""Zero-shot multiple choice: the answer that is likeliest as a whole ("acc") or per character ("acc_norm").

Prompts and scores are those of lm-eval. With memorizing, every question is scored twice: by the model as
trained, and by the model after it has read and learned what the question shows (see `eval.arms`); then the
question is asked in a new context.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nested_learning.checks import at_least, one_of
from nested_learning.eval.arms import BASELINE, Memorize, Memorizer, arms_of
from nested_learning.eval.evaluation import Evaluation
from nested_learning.eval.loading import Loaded
from nested_learning.eval.questions import TASKS, Question, read_questions
from nested_learning.eval.results import Metric, proportion
from nested_learning.eval.scorer import Score, Scorer
from nested_learning.log_lines import Row


@dataclass(frozen=True, kw_only=True, slots=True)
class ZeroShotSettings:
    """Settings of `ZeroShot`.

    Args:
        tasks: names in `TASKS`.
        local_dir: a folder with files of the tasks; None = the hub, through lm-eval.
        max_samples: how many questions of each task to take, from the first on; None = all.
        batch_size: answers scored together.
        state: "fresh": every question begins in an empty context; "carried": all questions, without their
            answers, are one stream in their order (see `Scorer`).
        memorize: how the model learns in the adapted arm; None = the baseline only.
    """

    tasks: tuple[str, ...] = tuple(TASKS)
    local_dir: Path | None = None
    max_samples: int | None = None
    batch_size: int = 8
    state: str = "fresh"
    memorize: Memorize | None = None

    def __post_init__(self) -> None:
        for task in self.tasks:
            one_of("--tasks", task, (*TASKS, "all"))
        at_least("max_samples", self.max_samples, 1)
        if self.memorize is not None and self.state != "fresh":
            raise ValueError(f"state must be fresh with memorizing, got {self.state!r}")


class ZeroShot(Evaluation[Question]):
    """Multiple-choice questions.

    Args:
        loaded: the checkpoint.
        settings: which questions, and how they are asked.

    Raises:
        FileNotFoundError, ConnectionError, ValueError: see `read_questions`.
    """

    name = "zeroshot"
    at_once = 16  # questions whose answers are sorted into batches together, and then logged

    def __init__(self, loaded: Loaded, settings: ZeroShotSettings) -> None:
        tasks, folder, most = settings.tasks, settings.local_dir, settings.max_samples
        self.questions = {task: read_questions(task, folder, most) for task in tasks}
        items = [(f"{task}/{i}", q) for task, asked in self.questions.items() for i, q in enumerate(asked)]
        super().__init__(loaded, settings, items)
        self.packages = () if folder is not None else ("lm-eval",)
        model, tokenizer, size = loaded.model, loaded.tokenizer, settings.batch_size
        self.scorer = Scorer(model, tokenizer, size, settings.state, device=loaded.device)
        self.adapted = Scorer(model, tokenizer, size, device=loaded.device)
        self.memorizer = None if settings.memorize is None else Memorizer(model, settings.memorize)

    def score(self, items: Sequence[Question]) -> list[Row]:
        """For every question the number of its right answer, and by arm what `choose` returns."""
        scores = self.scorer.loglikelihood([pair for question in items for pair in question.pairs])
        rows: list[Row] = []
        for question in items:
            own, scores = scores[: len(question.pairs)], scores[len(question.pairs) :]
            row: Row = {"gold": question.gold, BASELINE: choose(question, own)}
            if self.memorizer is not None:
                self.adapted.start = self.learn(question)
                row[self.memorizer.how.arm] = choose(question, self.adapted.loglikelihood(question.pairs))
            rows.append(row)
        return rows

    def learn(self, item: Question) -> Any:
        """Learn from a question: the start of a new context that keeps what was learned."""
        assert self.memorizer is not None
        text = item.solved if self.memorizer.how.use_correct_answer else item.shown
        ids = self.loaded.tokenizer.encode(text) or [self.loaded.tokenizer.eos_id]
        state = self.memorizer.read(torch.tensor([ids], device=self.loaded.device))
        return self.memorizer.memory(state)

    def replay(self, item: Question) -> None:
        """See `Evaluation`; a carried stream reads the question again."""
        self.scorer.replay(item.pairs)
        super().replay(item)

    def metrics(self, rows: Sequence[Row]) -> list[Metric]:
        """Accuracies of every task, by arm."""
        found, first = [], 0
        for task, asked in self.questions.items():
            found += task_metrics(task, asked, rows[first : first + len(asked)], self.memorize)
            first += len(asked)
        return found


def choose(question: Question, scores: Sequence[Score]) -> Row:
    """Log-likelihoods of the answers, and the number of the likeliest (the first of equal ones)."""
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
    """Accuracies of a task, by arm. Chance is the accuracy of uniform guesses among the answers."""
    chance = sum(1 / len(q.pairs) for q in questions) / len(questions)
    kinds = [("acc", "chosen"), ("acc_norm", "chosen_norm")][: 2 if TASKS[task].normalized else 1]
    return [
        proportion(task, name, sum(row[arm][key] == row["gold"] for row in rows), len(rows), chance, arm)
        for arm in arms_of(memorize)
        for name, key in kinds
    ]
