"""Losses of several checkpoints on several texts: what a model forgot while it learned the texts in a row."""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nested_learning.eval.arms import Memorize
from nested_learning.eval.evaluation import Evaluation, as_json, figure_path
from nested_learning.eval.forgetting import backward_transfer, forgetting, negated
from nested_learning.eval.loading import Loaded, load
from nested_learning.eval.plots import plot_forgetting
from nested_learning.eval.reader import TextReader
from nested_learning.eval.results import EvaluationResult, Metric, average
from nested_learning.eval.segments import Segments, Windows
from nested_learning.log_lines import Row


@dataclass(frozen=True, kw_only=True, slots=True)
class ContinualSettings:
    """Settings of `Continual`.

    Args:
        checkpoints: in the order of training.
        segments: the texts.
        windows: which of their tokens are scored.
        load_options: arguments of `loading.load`, besides the checkpoint.
        memorize: how the model learns in the adapted arm; None = the baseline only.
    """

    checkpoints: Sequence[str | Path]
    segments: Segments
    windows: Windows = field(default_factory=Windows)
    load_options: Mapping[str, Any] = field(default_factory=dict)
    memorize: Memorize | None = None


class SegmentBatch(NamedTuple):
    """A batch `tokens [B, T+1]` of a segment, for a checkpoint; both are given by number."""

    checkpoint: int
    segment: int
    tokens: Tensor


class Checkpoints:
    """Loads checkpoints by number, and keeps one of them in memory, with a new reader.

    Args:
        first: checkpoint number 0, in memory.
        settings: names the checkpoints.
    """

    def __init__(self, first: Loaded, settings: ContinualSettings) -> None:
        self.settings = settings
        self._keep(0, first)

    def loaded(self, number: int) -> Loaded:
        """Checkpoint number `number`."""
        if number != self._number:
            self._keep(number, load(self.settings.checkpoints[number], **self.settings.load_options))
        return self._loaded

    def reader(self, number: int) -> TextReader:
        """Its reader; what other checkpoints have learned is forgotten."""
        self.loaded(number)
        return self._reader

    def _keep(self, number: int, loaded: Loaded) -> None:
        self._number, self._loaded = number, loaded
        self._reader = TextReader(loaded.model, self.settings.memorize)


class Continual(Evaluation[SegmentBatch]):
    """The loss of every checkpoint on every segment.

    With as many checkpoints as segments, checkpoint i is the one after learning segment i, and the metrics
    include backward transfer and forgetting (of losses, in nats per token).

    Args:
        loaded: the first checkpoint.
        settings: the checkpoints and the texts.

    Raises:
        ValueError: checkpoints with different tokenizers, or a text too short for a batch.
    """

    name = "continual"
    given: ContinualSettings

    def __init__(self, loaded: Loaded, settings: ContinualSettings) -> None:
        self.checkpoints = Checkpoints(loaded, settings)
        about = [_describe(self.checkpoints.loaded(i)) for i in range(len(settings.checkpoints))]
        if len({entry["tokenizer"] for entry in about}) > 1:
            raise ValueError("checkpoints must share a tokenizer: losses per token are compared")
        self.about = about
        length = settings.windows.seq_len or loaded.config.train.seq_len
        self.windows = replace(settings.windows, seq_len=length)
        self.batches = self.windows.batches(settings.segments, loaded.tokenizer)
        super().__init__(loaded, settings, _items(len(settings.checkpoints), self.batches))

    def settings(self) -> dict[str, Any]:
        """See `Evaluation`."""
        return {
            "segments": [asdict(segment) for segment in self.given.segments.segments],
            "texts": [_digest(part) for part in self.batches],
            "checkpoints": [entry["sha256"] for entry in self.about],
            **asdict(self.windows),
            "memorize": as_json(self.memorize),
        }

    def log_settings(self) -> dict[str, Any]:
        """The settings alone: they name the checkpoints."""
        return self.settings()

    def checkpoint(self) -> dict[str, str]:
        """Paths and SHA-256 of all checkpoints."""
        return {entry["path"]: entry["sha256"] for entry in self.about}

    def score(self, items: Sequence[SegmentBatch]) -> list[Row]:
        """For every batch, by arm, the mean loss of every row in nats per token."""
        rows: list[Row] = []
        for item in items:
            losses = self.checkpoints.reader(item.checkpoint).losses(self._tokens(item))
            rows.append({arm: values.mean(1).tolist() for arm, values in losses.items()})
        return rows

    def learn(self, item: SegmentBatch) -> None:
        """See `Evaluation`."""
        self.checkpoints.reader(item.checkpoint).learn(self._tokens(item))

    def metrics(self, rows: Sequence[Row]) -> list[Metric]:
        """The matrix of losses and what follows from it, by arm."""
        return [
            metric
            for arm in self.arms
            for metric in continual_metrics(self._matrix(rows, arm), *self._labels(), arm)
        ]

    def draw(self, rows: Sequence[Row], result: EvaluationResult, output: Path) -> None:
        """The matrix of losses, a figure per arm."""
        for arm in self.arms:
            plot_forgetting(mean_losses(self._matrix(rows, arm)), *self._labels(), figure_path(output, arm))

    def _tokens(self, item: SegmentBatch) -> Tensor:
        return item.tokens.to(self.checkpoints.loaded(item.checkpoint).device)

    def _matrix(self, rows: Sequence[Row], arm: str) -> list[list[list[float]]]:
        return loss_matrix([item for _, item in self.items], rows, arm)

    def _labels(self) -> tuple[list[str], list[str]]:
        """Names of the checkpoints and of the segments."""
        segments = [segment.name for segment in self.given.segments.segments]
        return checkpoint_labels(self.given.checkpoints), segments


def _items(checkpoints: int, batches: list[list[Tensor]]) -> list[tuple[str, SegmentBatch]]:
    """Every batch for every checkpoint, checkpoint by checkpoint."""
    return [
        (f"{i} {j} {b}", SegmentBatch(i, j, tokens))
        for i in range(checkpoints)
        for j, part in enumerate(batches)
        for b, tokens in enumerate(part)
    ]


def _describe(loaded: Loaded) -> dict[str, str]:
    return {**loaded.describe(), "tokenizer": loaded.tokenizer.fingerprint}


def _digest(batches: list[Tensor]) -> str:
    return hashlib.sha256(torch.cat(batches).numpy().tobytes()).hexdigest()


def checkpoint_labels(checkpoints: Sequence[str | Path]) -> list[str]:
    """Short names of checkpoints, all different."""
    names = [path.stem if path.is_file() else path.name for path in map(Path, checkpoints)]
    return names if len(set(names)) == len(names) else [str(path) for path in checkpoints]


def loss_matrix(items: Sequence[SegmentBatch], rows: Sequence[Row], arm: str) -> list[list[list[float]]]:
    """`[checkpoints][segments][windows]`."""
    cells: dict[tuple[int, int], list[float]] = {}
    for item, row in zip(items, rows, strict=True):
        cells.setdefault((item.checkpoint, item.segment), []).extend(row[arm])
    shape = [1 + max(key[axis] for key in cells) for axis in (0, 1)]
    return [[cells[i, j] for j in range(shape[1])] for i in range(shape[0])]


def mean_losses(matrix: list[list[list[float]]]) -> list[list[float]]:
    """`[checkpoints][segments]`."""
    return [[statistics.fmean(cell) for cell in row] for row in matrix]


def continual_metrics(
    matrix: list[list[list[float]]], checkpoints: list[str], segments: list[str], arm: str
) -> list[Metric]:
    """Every cell of the matrix, and if it is square backward transfer and forgetting."""
    metrics = [
        average(f"{segment} after {checkpoint}", "loss", cell, arm=arm)
        for checkpoint, row in zip(checkpoints, matrix, strict=True)
        for segment, cell in zip(segments, row, strict=True)
    ]
    if len(checkpoints) == len(segments) > 1:
        scores = negated(mean_losses(matrix))
        count = len(segments) - 1
        for name, measure in (("backward transfer", backward_transfer), ("forgetting", forgetting)):
            metrics.append(Metric(task="all segments", name=name, value=measure(scores), n=count, arm=arm))
    return metrics
