"""Asking for what was hidden in a long prompt, over lengths and depths: what `niah` and `passkey` share.

A prompt and the room for its answer fill a context length, counted in tokens of the model's own tokenizer.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from nested_learning.data.tokenizer import Tokenizer
from nested_learning.eval.answer import Answerer, encode
from nested_learning.eval.haystack import Sample
from nested_learning.eval.loading import Loaded
from nested_learning.eval.memorize import Memorize
from nested_learning.eval.plots import draw_maps
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

Build = Callable[[str, int, float | None, random.Random], Sample]
"""From task, size, depth and source of chance to a sample; a ValueError for a size that is too small."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Grid:
    """Which samples to ask.

    Args:
        tasks: names that the builder knows.
        context_lengths: tokens of a prompt and its answer, at most.
        samples_per_length: of every task; their depths go round the grid.
        depths: places of the needle asked for, evenly spread from start to end.
        seed: decides all samples.
        max_new_tokens: room for the answer.
    """

    tasks: tuple[str, ...]
    context_lengths: tuple[int, ...]
    samples_per_length: int
    depths: int
    seed: int
    max_new_tokens: int

    def __post_init__(self) -> None:
        if not self.tasks or not self.context_lengths:
            raise ValueError("tasks and context_lengths must not be empty")
        for name in ("samples_per_length", "depths", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    def depth(self, index: int) -> float:
        """Depth of the needle asked for in sample number `index`."""
        return (index % self.depths) / max(1, self.depths - 1)

    def items(self) -> list[tuple[str, tuple[str, int, int]]]:
        """Key and (task, length, index) of every sample."""
        triples = [
            (task, length, index)
            for task in self.tasks
            for length in self.context_lengths
            for index in range(self.samples_per_length)
        ]
        return [(f"{task} {length} {index}", (task, length, index)) for task, length, index in triples]


class Filler:
    """Makes samples that fill their context length as well as can be.

    Args:
        build: makes a sample of a given size.
        grid: as in the evaluation.
        tokenizer: counts.
    """

    def __init__(self, build: Build, grid: Grid, tokenizer: Tokenizer) -> None:
        self.build = build
        self.grid = grid
        self.tokenizer = tokenizer
        self._sizes: dict[tuple[str, int], int] = {}

    def sample(self, task: str, length: int, index: int) -> Sample:
        """Sample number `index`: the same one in every evaluation of equal grid and tokenizer.

        The size is found by bisection on the first sample of a task and length, and lowered for others until
        they fit, as in RULER.

        Raises:
            ValueError: a length that the smallest prompt does not fit.
        """
        first = (task, length)
        if first not in self._sizes:
            self._sizes[first] = self._largest(task, length)
        size = self._sizes[first]
        while not self._fits(sample := self._build(task, length, index, size), length):
            size -= max(1, size // 100)
        return sample

    def _build(self, task: str, length: int, index: int, size: int) -> Sample:
        rng = random.Random(f"{self.grid.seed} {task} {length} {index}")
        return self.build(task, size, self.grid.depth(index), rng)

    def _fits(self, sample: Sample, length: int) -> bool:
        return len(encode(self.tokenizer, sample.prompt)) + self.grid.max_new_tokens <= length

    def _largest(self, task: str, length: int) -> int:
        """The largest size of the first sample that fits."""
        low = self._smallest(task, length)
        fits = partial(self._fits, length=length)
        high = 2 * low
        while fits(self._build(task, length, 0, high)):
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(self._build(task, length, 0, middle)) else (low, middle)
        return low

    def _smallest(self, task: str, length: int) -> int:
        for size in range(1, 1000):
            try:
                sample = self._build(task, length, 0, size)
            except ValueError:
                continue
            if self._fits(sample, length):
                return size
            least = len(encode(self.tokenizer, sample.prompt)) + self.grid.max_new_tokens
            break
        raise ValueError(
            f"context_lengths must be at least {least} for {task} with this tokenizer, got {length}"
        )


def retrieve(
    loaded: Loaded,
    grid: Grid,
    build: Build,
    memorize: Memorize | None,
    output: Path,
    about: dict[str, Any],
) -> Result:
    """Ask all samples of `grid`, resume what an earlier call has begun, and write the result beside its maps.

    Args:
        build: makes samples.
        output: the result file; `.samples.jsonl` and `.png` (one per arm) go beside it.
        about: "evaluation", "score" (name of the metric), "chance", and further settings.
    """
    evaluation, name, chance = (about[key] for key in ("evaluation", "score", "chance"))
    settings = {
        **about,
        **asdict(grid),
        "checkpoint": loaded.sha256,
        "memorize": None if memorize is None else memorize.settings(),
    }
    filler = Filler(build, grid, loaded.tokenizer)
    answerer = Answerer(loaded, memorize, grid.max_new_tokens)

    def score(item: tuple[str, int, int]) -> Row:
        sample = filler.sample(*item)
        said = answerer.answer(sample.prompt, ", ".join(sample.answers))
        tokens = len(encode(loaded.tokenizer, sample.prompt))
        found = {arm: matches(text, sample.answers) for arm, text in said.items()}
        return {
            "tokens": tokens,
            "depths": sample.depths,
            "answers": sample.answers,
            "said": said,
            "found": found,
        }

    def replay(item: tuple[str, int, int]) -> None:
        if memorize is not None and not memorize.adapt.reset:
            sample = filler.sample(*item)
            answerer.learn(sample.prompt, ", ".join(sample.answers))

    for task in grid.tasks:  # is there room for a prompt? Before a log is begun
        filler.sample(task, min(grid.context_lengths), 0)
    items = grid.items()
    rows = evaluate_samples(samples_path(output), settings, items, score, evaluation, replay)
    samples = list(zip([item for _, item in items], rows, strict=True))
    metrics = [
        metric for arm in answerer.arms for metric in retrieval_metrics(grid, samples, arm, name, chance)
    ]
    result = Result(
        evaluation=evaluation,
        checkpoint=loaded.describe(),
        settings=settings,
        versions=versions(),
        metrics=metrics,
        samples=len(rows),
    )
    write_result(output, result)
    for arm in answerer.arms:
        draw(grid, samples, arm, output)
    return read_result(output)


def matches(text: str, answers: Sequence[str]) -> list[int]:
    """1 for every answer that the text contains, in any case (RULER's `string_match_all` is the mean)."""
    return [int(answer.lower() in text.lower()) for answer in answers]


def retrieval_metrics(
    grid: Grid, samples: list[tuple[tuple[str, int, int], Row]], arm: str, name: str, chance: float
) -> list[Metric]:
    """The part of the answers that was found: a metric per task and length, and one over all tasks."""
    metrics = []
    for length in grid.context_lengths:
        of_length = [(task, row) for (task, at, _), row in samples if at == length]
        groups = {task: [row for name, row in of_length if name == task] for task in grid.tasks}
        if len(groups) > 1:
            groups["all tasks"] = [row for _, row in of_length]
        for task, rows in groups.items():
            shares = [sum(row["found"][arm]) / len(row["answers"]) for row in rows]
            metrics.append(proportion(f"{task} at {length}", name, sum(shares), len(shares), chance, arm))
    return metrics


def draw(grid: Grid, samples: list[tuple[tuple[str, int, int], Row]], arm: str, output: Path) -> None:
    """Draw the maps of all tasks, by the depth where each answer stands, to a PNG beside the result."""
    depths = [grid.depth(i) for i in range(grid.depths)]
    maps = {}
    for task in grid.tasks:
        cells: dict[tuple[int, int], list[int]] = {}
        for (name, length, _), row in samples:
            for depth, found in zip(row["depths"], row["found"][arm], strict=True):
                near = min(range(len(depths)), key=lambda i: abs(depths[i] - depth))
                if name == task:
                    cells.setdefault((length, near), []).append(found)
        maps[task] = [
            [_mean(cells.get((length, i), [])) for i in range(len(depths))] for length in grid.context_lengths
        ]
    suffix = ".png" if arm == BASELINE else ".adapted.png"
    draw_maps(maps, grid.context_lengths, depths, output.with_suffix(suffix))


def _mean(values: list[int]) -> float | None:
    return sum(values) / len(values) if values else None
