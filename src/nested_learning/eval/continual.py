"""Losses of several checkpoints on several texts: what a model forgot while it learned them in a row."""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nested_learning.adapt.memorize import memorize as read_and_learn
from nested_learning.adapt.memorize import score
from nested_learning.eval.forgetting import backward_transfer, forgetting, negated
from nested_learning.eval.loading import Loaded, load
from nested_learning.eval.memorize import Memorize
from nested_learning.eval.plots import plot_forgetting
from nested_learning.eval.results import (
    BASELINE,
    Metric,
    Result,
    Row,
    average,
    evaluate_samples,
    read_result,
    samples_path,
    versions,
    write_result,
)
from nested_learning.eval.segments import Segments, Windows


class Item(NamedTuple):
    """A batch `tokens [B, T+1]` of a segment for a checkpoint, both by number."""

    checkpoint: int
    segment: int
    tokens: Tensor


class Scorer:
    """Scores batches; keeps one model at a time."""

    def __init__(
        self, checkpoints: Sequence[str | Path], model_options: dict[str, Any], memorize: Memorize | None
    ) -> None:
        self.checkpoints = checkpoints
        self.options = model_options
        self.memorize = memorize
        self._current: tuple[int, Loaded] | None = None
        self._carried: Any = None

    def load(self, number: int) -> Loaded:
        """Checkpoint number `number`; what was learned by the one before is forgotten."""
        if self._current is None or self._current[0] != number:
            self._current = number, load(self.checkpoints[number], **self.options)
            self._carried = None
        return self._current[1]

    def losses(self, item: Item) -> dict[str, list[float]]:
        """Mean loss of every row in nats per token, in every arm.

        Adapted: every chunk is scored, then learned from. With gold text: all is learned, then read in a new
        context.
        """
        loaded = self.load(item.checkpoint)
        model, tokens = loaded.model, item.tokens.to(loaded.device)
        found = {BASELINE: _row_means(score(model, tokens)[0])}
        if self.memorize is not None:
            losses, state = self._learn(loaded, tokens)
            if self.memorize.use_correct_answer:
                losses, _ = score(model, tokens, self.memorize.memory(model, state))
            found[self.memorize.arm] = _row_means(losses)
        return found

    def catch_up(self, item: Item) -> None:
        """Learn what is carried on from a batch whose losses are known."""
        if self.memorize is not None and not self.memorize.adapt.reset:
            loaded = self.load(item.checkpoint)
            self._learn(loaded, item.tokens.to(loaded.device))

    def _learn(self, loaded: Loaded, tokens: Tensor) -> tuple[Tensor, Any]:
        """Losses `[B, T]` from before learning from each chunk, and the state after it."""
        assert self.memorize is not None
        report, state = read_and_learn(loaded.model, tokens, self._carried, self.memorize.adapt)
        self._carried = self.memorize.carried(loaded.model, state)
        return report.losses, state


def _row_means(losses: Tensor) -> list[float]:
    means: list[float] = losses.mean(1).tolist()
    return means


def evaluate_continual(
    checkpoints: Sequence[str | Path],
    segments: Segments,
    windows: Windows,
    output: Path,
    model_options: dict[str, Any] | None = None,
    memorize: Memorize | None = None,
) -> Result:
    """The loss of every checkpoint on every segment; interrupted, the same call goes on.

    With as many checkpoints as segments, checkpoint i is the one after learning segment i: then backward
    transfer and forgetting are reported too (of losses, in nats per token).

    Args:
        checkpoints: in the order of training.
        output: the result file; `.samples.jsonl` and `.png` (one per arm) go beside it.
        model_options: of `loading.load`, beside the checkpoint.
        memorize: also by a model that learns while it reads.

    Raises:
        ValueError: checkpoints with different tokenizers, or a text too short for a batch.
    """
    scorer = Scorer(checkpoints, model_options or {}, memorize)
    about = [_describe(scorer.load(i)) for i in range(len(checkpoints))]
    if len({entry["tokenizer"] for entry in about}) > 1:
        raise ValueError("checkpoints must share a tokenizer: losses per token are compared")
    first = scorer.load(0)
    windows = replace(windows, seq_len=windows.seq_len or first.config.train.seq_len)
    batches = windows.batches(segments, first.tokenizer)
    settings = {
        "segments": [asdict(segment) for segment in segments.segments],
        "texts": [_digest(part) for part in batches],
        "checkpoints": [entry["sha256"] for entry in about],
        **asdict(windows),
        "memorize": None if memorize is None else memorize.settings(),
    }
    items = _items(len(checkpoints), batches)
    rows = evaluate_samples(
        samples_path(output), settings, items, scorer.losses, "continual", scorer.catch_up
    )
    names = [segment.name for segment in segments.segments]
    metrics = []
    for arm in [BASELINE] if memorize is None else [BASELINE, memorize.arm]:
        matrix = loss_matrix([item for _, item in items], rows, arm)
        metrics += continual_metrics(matrix, checkpoint_labels(checkpoints), names, arm)
        picture = output.with_suffix(".png" if arm == BASELINE else ".adapted.png")
        plot_forgetting(mean_losses(matrix), checkpoint_labels(checkpoints), names, picture)
    result = Result(
        evaluation="continual",
        checkpoint={entry["path"]: entry["sha256"] for entry in about},
        settings=settings,
        versions=versions(),
        metrics=metrics,
        samples=len(rows),
    )
    write_result(output, result)
    return read_result(output)


def _items(checkpoints: int, batches: list[list[Tensor]]) -> list[tuple[str, Item]]:
    """Every batch for every checkpoint, checkpoint by checkpoint."""
    return [
        (f"{i} {j} {b}", Item(i, j, tokens))
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


def loss_matrix(items: Sequence[Item], rows: Sequence[Row], arm: str) -> list[list[list[float]]]:
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
