"""Retrieval from long prompts, over context lengths and depths: what `niah` and `passkey` share.

A prompt and the room for its answer fill a context length, counted in tokens of the model's own tokenizer.
"""

from __future__ import annotations

import random
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from nested_learning.checks import at_least
from nested_learning.data.synthetic.needle import NOISE as NOISE_WORDS
from nested_learning.data.tokenizer import Tokenizer
from nested_learning.eval.answer import Answerer
from nested_learning.eval.arms import Memorize
from nested_learning.eval.evaluation import Evaluation, figure_path
from nested_learning.eval.loading import Loaded
from nested_learning.eval.plots import draw_maps
from nested_learning.eval.results import EvaluationResult, Metric, proportion
from nested_learning.eval.tokenizers import encode_long
from nested_learning.log_lines import Row

NOISE = tuple(sentence.replace(" .", ".") for sentence in NOISE_WORDS)
"""Sentences that say nothing, as filler."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Haystack:
    """A prompt, its answers, and the depth of each: the share of the haystack that is before it, 0 to 1."""

    prompt: str
    answers: tuple[str, ...]
    depths: tuple[float, ...]


Build = Callable[[str, int, float, random.Random], Haystack]
"""Builds a prompt from task, size, depth and random generator; a ValueError for a size that is too small."""


class GridPoint(NamedTuple):
    """Which sample: its task, its context length, and its number among those of both."""

    task: str
    length: int
    number: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Grid:
    """The samples of an evaluation: tasks × context lengths × depths.

    Args:
        tasks: names that the evaluation knows.
        context_lengths: tokens of a prompt and its answer, at most.
        samples_per_length: number of samples of each task and length; they take the depths in turn.
        depths: number of depths of the needle that is asked for, evenly spread from start to end.
        seed: determines all samples.
        max_new_tokens: room for the answer.
        memorize: how the model learns in the adapted arm; None = the baseline only.
    """

    tasks: tuple[str, ...]
    context_lengths: tuple[int, ...]
    samples_per_length: int
    depths: int
    seed: int
    max_new_tokens: int
    memorize: Memorize | None = None

    def __post_init__(self) -> None:
        if not self.tasks or not self.context_lengths:
            raise ValueError("tasks and context_lengths must not be empty")
        for name in ("samples_per_length", "depths", "max_new_tokens"):
            at_least(name, getattr(self, name), 1)

    def depth(self, index: int) -> float:
        """Depth of the needle that sample number `index` asks for."""
        return (index % self.depths) / max(1, self.depths - 1)

    def items(self) -> list[tuple[str, GridPoint]]:
        """Key and point of every sample."""
        places = [
            GridPoint(task, length, number)
            for task in self.tasks
            for length in self.context_lengths
            for number in range(self.samples_per_length)
        ]
        return [(f"{point.task} {point.length} {point.number}", point) for point in places]


class Retrieval(Evaluation[GridPoint]):
    """Asks for what is hidden in long prompts; the score is the share of the answers in the generated text.

    Args:
        loaded: the checkpoint.
        grid: which samples.

    Raises:
        ValueError: a context length without room for a prompt.
    """

    metric: ClassVar[str]
    given: Grid

    def __init__(self, loaded: Loaded, grid: Grid) -> None:
        super().__init__(loaded, grid, grid.items())
        self.filler = Filler(self.build, grid, loaded.tokenizer)
        self.answerer = Answerer(loaded, grid.memorize, grid.max_new_tokens)
        for task in grid.tasks:  # refuse a length without room before anything is scored
            self.filler.fill(GridPoint(task, min(grid.context_lengths), 0))

    @abstractmethod
    def build(self, task: str, size: int, depth: float, rng: random.Random) -> Haystack:
        """A prompt with a haystack of `size`; a ValueError for a size that is too small."""

    def settings(self) -> dict[str, Any]:
        """See `Evaluation`."""
        about = {"evaluation": self.name, "score": self.metric, "chance": 0.0}
        return {**about, **super().settings(), "checkpoint": self.loaded.sha256}

    def score(self, items: Sequence[GridPoint]) -> list[Row]:
        """What each arm said, and which answers it contains."""
        return [self._ask(self.filler.fill(point)) for point in items]

    def learn(self, item: GridPoint) -> None:
        """See `Evaluation`."""
        sample = self.filler.fill(item)
        self.answerer.learn(sample.prompt, ", ".join(sample.answers))

    def _ask(self, sample: Haystack) -> Row:
        said = self.answerer.answer(sample.prompt, ", ".join(sample.answers))
        return {
            "tokens": len(encode_long(self.loaded.tokenizer, sample.prompt)),
            "depths": sample.depths,
            "answers": sample.answers,
            "said": said,
            "found": {arm: matches(text, sample.answers) for arm, text in said.items()},
        }

    def metrics(self, rows: Sequence[Row]) -> list[Metric]:
        """The share of answers that was found, per task and length and over all tasks of a length."""
        return [metric for arm in self.arms for metric in self._metrics(rows, arm)]

    def _metrics(self, rows: Sequence[Row], arm: str) -> list[Metric]:
        found = []
        for length in self.given.context_lengths:
            own = [(point.task, row) for point, row in self._with_points(rows) if point.length == length]
            groups = {task: [row for name, row in own if name == task] for task in self.given.tasks}
            if len(groups) > 1:
                groups["all tasks"] = [row for _, row in own]
            for task, group in groups.items():
                shares = [sum(row["found"][arm]) / len(row["answers"]) for row in group]
                found.append(
                    proportion(f"{task} at {length}", self.metric, sum(shares), len(shares), 0.0, arm)
                )
        return found

    def draw(self, rows: Sequence[Row], result: EvaluationResult, output: Path) -> None:
        """A figure per arm, with a map of lengths and depths for every task."""
        depths = [self.given.depth(i) for i in range(self.given.depths)]
        for arm in self.arms:
            maps = {task: self._map(rows, task, arm, depths) for task in self.given.tasks}
            draw_maps(maps, self.given.context_lengths, depths, figure_path(output, arm))

    def _map(
        self, rows: Sequence[Row], task: str, arm: str, depths: Sequence[float]
    ) -> list[list[float | None]]:
        """Share of answers found, `[lengths][depths]`; each answer counts at the depth nearest to its own."""
        cells: dict[tuple[int, int], list[int]] = {}
        for point, row in self._with_points(rows):
            if point.task != task:
                continue
            for depth, found in zip(row["depths"], row["found"][arm], strict=True):
                near = min(range(len(depths)), key=lambda i: abs(depths[i] - depth))
                cells.setdefault((point.length, near), []).append(found)
        return [
            [_mean(cells.get((length, i), [])) for i in range(len(depths))]
            for length in self.given.context_lengths
        ]

    def _with_points(self, rows: Sequence[Row]) -> list[tuple[GridPoint, Row]]:
        return list(zip([point for _, point in self.items], rows, strict=True))


class Filler:
    """Builds prompts that fill their context length as far as possible.

    Args:
        build: builds a prompt of a given size.
        grid: as in the evaluation.
        tokenizer: counts the tokens.
    """

    def __init__(self, build: Build, grid: Grid, tokenizer: Tokenizer) -> None:
        self.build = build
        self.grid = grid
        self.tokenizer = tokenizer
        self._sizes: dict[tuple[str, int], int] = {}

    def fill(self, point: GridPoint) -> Haystack:
        """The prompt of a point: the same one in every evaluation with the same grid and tokenizer.

        The size is found by bisection on the first sample of a task and length, and reduced for others until
        they fit, as in RULER.

        Raises:
            ValueError: a length that the smallest prompt does not fit.
        """
        first = (point.task, point.length)
        if first not in self._sizes:
            self._sizes[first] = self._largest(GridPoint(*first, 0))
        size = self._sizes[first]
        while not self._fits(sample := self._build(point, size), point.length):
            size -= max(1, size // 100)
        return sample

    def _build(self, point: GridPoint, size: int) -> Haystack:
        rng = random.Random(f"{self.grid.seed} {point.task} {point.length} {point.number}")
        return self.build(point.task, size, self.grid.depth(point.number), rng)

    def _needed(self, sample: Haystack) -> int:
        return len(encode_long(self.tokenizer, sample.prompt)) + self.grid.max_new_tokens

    def _fits(self, sample: Haystack, length: int) -> bool:
        return self._needed(sample) <= length

    def _largest(self, point: GridPoint) -> int:
        """The largest size that fits."""
        low = self._smallest(point)
        fits = partial(self._fits, length=point.length)
        high = 2 * low
        while fits(self._build(point, high)):
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(self._build(point, middle)) else (low, middle)
        return low

    def _smallest(self, point: GridPoint) -> int:
        for size in range(1, 1000):
            try:
                sample = self._build(point, size)
            except ValueError:
                continue
            if self._fits(sample, point.length):
                return size
            break
        raise ValueError(
            f"context_lengths must be at least {self._needed(sample)} for {point.task} with this tokenizer, "
            f"got {point.length}"
        )


def matches(text: str, answers: Sequence[str]) -> list[int]:
    """1 for every answer that the text contains, ignoring case (RULER's `string_match_all` is the mean)."""
    return [int(answer.lower() in text.lower()) for answer in answers]


def _mean(values: list[int]) -> float | None:
    return sum(values) / len(values) if values else None
