"""Several checkpoints side by side: one table of all their numbers, a column per checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nested_learning.data.files import find_files
from nested_learning.eval.arms import BASELINE
from nested_learning.eval.evaluation import Evaluation, evaluate
from nested_learning.eval.loading import Loaded, load, locate
from nested_learning.eval.perplexity import LongPerplexity, LongTexts, draw_positions
from nested_learning.eval.results import EvaluationResult, Metric, read_result
from nested_learning.eval.zeroshot import ZeroShot, ZeroShotSettings
from nested_learning.report import markdown_table
from nested_learning.train.checkpoint import CheckpointError

Key = tuple[str, str, str, str]
"""Evaluation, task, metric and arm."""
FREE = ("batch_size", "checkpoint", "checkpoints", "tasks", "context_lengths")
"""Settings on which neither the numbers nor their names depend."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CompareSettings:
    """How checkpoints that come without results are evaluated.

    Args:
        zeroshot, perplexity: settings of the evaluations; None = not run.
        device: where.
        fresh: whether to score again what earlier calls have scored.
    """

    zeroshot: ZeroShotSettings | None = None
    perplexity: LongTexts | None = None
    device: str = "cpu"
    fresh: bool = False

    def evaluations(self, loaded: Loaded) -> Iterator[Evaluation[Any]]:
        """The evaluations of a checkpoint."""
        if self.zeroshot is not None:
            yield ZeroShot(loaded, self.zeroshot)
        if self.perplexity is not None:
            yield LongPerplexity(loaded, self.perplexity)


def gather(sources: Sequence[str], settings: CompareSettings) -> list[EvaluationResult]:
    """Results of all sources: result files, folders of them, and checkpoints, which are evaluated.

    Samples that an earlier call has scored are not scored again.

    Raises:
        FileNotFoundError: a source that is none of these.
        ValueError: a checkpoint without an evaluation to run on it.
    """
    found: list[EvaluationResult] = []
    for source in sources:
        found += (
            evaluate_checkpoint(source, settings)
            if is_checkpoint(source)
            else [read_result(path) for path in result_files([source])]
        )
    return found


def evaluate_checkpoint(checkpoint: str, settings: CompareSettings) -> list[EvaluationResult]:
    """Run the evaluations of `settings` on a checkpoint."""
    if settings.zeroshot is None and settings.perplexity is None:
        raise ValueError(f"{checkpoint} is a checkpoint: say what to run on it, with --local-dir or --length")
    loaded = load(checkpoint, device=settings.device)
    return [
        evaluate(evaluation, loaded.output(evaluation.name), settings.fresh)
        for evaluation in settings.evaluations(loaded)
    ]


def is_checkpoint(source: str) -> bool:
    """Whether a source is a checkpoint, not a result."""
    try:
        return locate(source).suffix != ".json"
    except CheckpointError:
        return False


def write(results: Sequence[EvaluationResult], output: Path) -> str:
    """Write the table, and beside it the figure of losses by position if there are any; return the table."""
    table = compare(results)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(table, encoding="utf-8")
    named = zip(column_names(results), results, strict=True)
    if curves := {name: result for name, result in named if result.evaluation == "long_perplexity"}:
        draw_positions(curves, output.with_suffix(".png"))
    return table


def result_files(sources: Sequence[str | Path]) -> list[Path]:
    """The result files that files and folders stand for; a folder stands for all files in it, by name.

    Raises:
        FileNotFoundError: a source that is not there, or a folder without result files.
    """
    found: list[Path] = []
    for source in map(Path, sources):
        files = find_files(source, (".json",), deep=False).files if source.is_dir() else [source]
        if not files or not files[0].is_file():
            raise FileNotFoundError(f"there is no result file at {source}")
        found += files
    return found


def compare(results: Sequence[EvaluationResult]) -> str:
    """A Markdown table: a row per evaluation, task, metric and arm, a column per checkpoint.

    A 95 % interval is shown as its half width after ±, or by its ends if it is not symmetric.

    Raises:
        ValueError: no results, or results of one evaluation with different settings.
    """
    if not results:
        raise ValueError("no results to compare")
    check_settings(results)
    columns = column_names(results)
    cells: dict[Key, dict[str, str]] = {}
    for result, column in zip(results, columns, strict=True):
        for m in result.metrics:
            cells.setdefault((result.evaluation, m.task, m.name, m.arm), {})[column] = show(m)
    several = any(arm != BASELINE for *_, arm in cells)
    shown = list(dict.fromkeys(columns))
    header = ["evaluation", "task", "metric", *(["arm"] if several else []), "chance", *shown]
    chances = {
        (r.evaluation, m.task, m.name, m.arm): m.chance
        for r in results
        for m in r.metrics
        if m.chance is not None
    }
    rows = []
    for key, by_column in cells.items():
        names = list(key if several else key[:3])
        chance = f"{chances[key]:.4g}" if key in chances else ""
        rows.append([*names, chance, *(by_column.get(column, "") for column in shown)])
    return markdown_table(header, rows)


def show(metric: Metric) -> str:
    """A number with its interval, for a cell of a table."""
    if metric.low is None or metric.high is None:
        return f"{metric.value:.4f}"
    down, up = metric.value - metric.low, metric.high - metric.value
    if abs(up - down) < 0.05 * (up + down):
        return f"{metric.value:.4f} ± {(up + down) / 2:.4f}"
    return f"{metric.value:.4f} ({metric.low:.4f} to {metric.high:.4f})"


def column_names(results: Sequence[EvaluationResult]) -> list[str]:
    """A name per result, the same for the same checkpoint; ambiguous names get a hash suffix."""
    names = [result.checkpoint.get("name") or ", ".join(result.checkpoint) for result in results]
    hashes = [result.checkpoint.get("sha256", "")[:8] for result in results]
    owners: dict[str, set[str]] = {}
    for name, digest in zip(names, hashes, strict=True):
        owners.setdefault(name, set()).add(digest)
    return [
        f"{name} {digest}" if len(owners[name]) > 1 else name
        for name, digest in zip(names, hashes, strict=True)
    ]


def check_settings(results: Sequence[EvaluationResult]) -> None:
    """Refuse results whose numbers cannot be compared.

    Raises:
        ValueError: two results of one evaluation with different settings.
    """
    first: dict[str, EvaluationResult] = {}
    for result in results:
        other = first.setdefault(result.evaluation, result)
        for key in {**other.settings, **result.settings}:
            values = other.settings.get(key), result.settings.get(key)
            alone = key == "memorize" and None in values  # an arm of one result only has a row of its own
            if key not in FREE and values[0] != values[1] and not alone:
                raise ValueError(
                    f"results of {result.evaluation} differ in {key} ({values[0]!r} and {values[1]!r}), "
                    "so their numbers cannot be compared"
                )
