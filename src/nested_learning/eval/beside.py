"""Matrices of losses of several models side by side: what each learned, and what it forgot meanwhile.

A matrix is the result of `nl eval continual`: the loss of every checkpoint of a model on every text.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nested_learning.eval.arms import BASELINE
from nested_learning.eval.compare import check_settings, show
from nested_learning.eval.plots import draw_matrices
from nested_learning.eval.results import EvaluationResult, Metric, read_result
from nested_learning.report import markdown_table


@dataclass(frozen=True, kw_only=True, slots=True)
class LossMatrix:
    """Losses of a model in nats per token: `cells[checkpoint][text]`.

    Args:
        model: what it is called in tables and pictures.
        checkpoints, texts: names of rows and columns, in the order of training.
        cells: the losses.
    """

    model: str
    checkpoints: tuple[str, ...]
    texts: tuple[str, ...]
    cells: tuple[tuple[Metric, ...], ...]

    def losses(self) -> list[list[float]]:
        """The values alone."""
        return [[cell.value for cell in row] for row in self.cells]

    def changes(self) -> list[float]:
        """By text, the loss of the last checkpoint less that of the first: what was forgotten is positive."""
        first, last = self.losses()[0], self.losses()[-1]
        return [after - before for before, after in zip(first, last, strict=True)]


def read_matrices(paths: Sequence[str | Path]) -> list[LossMatrix]:
    """The matrices in result files of `nl eval continual`, each called as its file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: two files of one name; a file of another evaluation or of one checkpoint; results on other
            texts, or with other checkpoints, than the first.
    """
    names = [Path(path).stem for path in paths]
    if len(set(names)) < len(names):
        raise ValueError(f"result files must have different names, got {', '.join(names)}")
    results = [read_result(path) for path in paths]
    for path, result in zip(paths, results, strict=True):
        if result.evaluation != "continual" or len(result.checkpoint) < 2:
            raise ValueError(f"{path} must hold a result of nl eval continual with two checkpoints or more")
    check_settings([replace(result, settings=_without_paths(result)) for result in results])
    made = [_matrix(name, result) for name, result in zip(names, results, strict=True)]
    for matrix in made:
        if matrix.checkpoints != made[0].checkpoints:
            raise ValueError(
                f"{matrix.model} has the checkpoints {', '.join(matrix.checkpoints)}, {made[0].model} has "
                f"{', '.join(made[0].checkpoints)}; name the folders of all models alike, such as "
                "outputs/MODEL/base"
            )
    return made


def _without_paths(result: EvaluationResult) -> dict[str, Any]:
    """The settings with the names of the texts, whose hashes say what was in their files."""
    return {**result.settings, "segments": [segment["name"] for segment in result.settings["segments"]]}


def _matrix(name: str, result: EvaluationResult) -> LossMatrix:
    texts = tuple(segment["name"] for segment in result.settings["segments"])
    found = [m for m in result.metrics if m.name == "loss" and m.arm == BASELINE]
    rows = [tuple(found[at : at + len(texts)]) for at in range(0, len(found), len(texts))]
    labels = tuple(row[0].task.removeprefix(f"{texts[0]} after ") for row in rows)
    return LossMatrix(model=name, checkpoints=labels, texts=texts, cells=tuple(rows))


def changes_table(matrices: Sequence[LossMatrix]) -> str:
    """A Markdown table with a row per model and text: the loss after every checkpoint, and the change."""
    header = ["model", "scored on", *(f"after {name}" for name in matrices[0].checkpoints), "change"]
    rows = [
        [matrix.model, text, *(show(row[j]) for row in matrix.cells), f"{matrix.changes()[j]:+.4f}"]
        for matrix in matrices
        for j, text in enumerate(matrix.texts)
    ]
    return markdown_table(header, rows)


def draw_beside(matrices: Sequence[LossMatrix], path: Path) -> None:
    """Draw a map per model on one scale, and the changes of all models as bars."""
    path.parent.mkdir(parents=True, exist_ok=True)
    first = matrices[0]
    panels = {matrix.model: matrix.losses() for matrix in matrices}
    changes = {matrix.model: matrix.changes() for matrix in matrices}
    draw_matrices(panels, changes, first.checkpoints, first.texts, path)


def in_words(matrix: LossMatrix) -> str:
    """One line: what the model forgot of all texts but the last, and learned of the last."""
    *earlier, last = matrix.changes()
    lost = f"{statistics.fmean(earlier):+.3f} on {', '.join(matrix.texts[:-1])}" if earlier else ""
    return f"{matrix.model}: {lost}{', ' if lost else ''}{last:+.3f} on {matrix.texts[-1]} (nats per token)"
