"""Several checkpoints side by side: one table of all their numbers, a column per checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nested_learning.data.files import find_files
from nested_learning.eval.loading import load, locate
from nested_learning.eval.perplexity import LongTexts, draw_positions, evaluate_perplexity
from nested_learning.eval.results import BASELINE, Metric, Result, read_result
from nested_learning.eval.zeroshot import ZeroShot, evaluate_zeroshot
from nested_learning.train.checkpoint import CheckpointError

Key = tuple[str, str, str, str]
"""Evaluation, task, metric and arm."""
FREE = ("batch_size", "checkpoint", "checkpoints", "tasks", "context_lengths")
"""Settings that change neither a number nor its name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """How checkpoints that come without results are evaluated.

    Args:
        zeroshot, perplexity: what to run on each; None = not.
        device: where.
        fresh: score again what earlier calls have scored.
    """

    zeroshot: ZeroShot | None = None
    perplexity: LongTexts | None = None
    device: str = "cpu"
    fresh: bool = False


def gather(sources: Sequence[str], plan: Plan) -> list[Result]:
    """Results of all sources: result files, folders of them, and checkpoints, which are evaluated.

    Samples that an earlier call has scored are not scored again.

    Raises:
        FileNotFoundError: a source that is none of these.
        ValueError: a checkpoint that nothing shall be run on.
    """
    found: list[Result] = []
    for source in sources:
        found += (
            evaluate(source, plan)
            if is_checkpoint(source)
            else [read_result(path) for path in result_files([source])]
        )
    return found


def is_checkpoint(source: str) -> bool:
    """Whether a source is a checkpoint and no result."""
    try:
        return locate(source).suffix != ".json"
    except CheckpointError:
        return False


def evaluate(checkpoint: str, plan: Plan) -> list[Result]:
    """Run what `plan` says on a checkpoint."""
    if plan.zeroshot is None and plan.perplexity is None:
        raise ValueError(f"{checkpoint} is a checkpoint: say what to run on it, with --local-dir or --length")
    loaded, found = load(checkpoint, device=plan.device), []
    if plan.zeroshot is not None:
        output = loaded.output("zeroshot")
        found.append(evaluate_zeroshot(loaded, plan.zeroshot, output, plan.fresh))
    if plan.perplexity is not None:
        output = loaded.output("long_perplexity")
        found.append(evaluate_perplexity(loaded, plan.perplexity, output, plan.fresh))
    return found


def write(results: Sequence[Result], output: Path) -> str:
    """Write the table, and the loss by position if there is one, beside each other: the table."""
    table = compare(results)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(table, encoding="utf-8")
    named = zip(column_names(results), results, strict=True)
    if curves := {name: result for name, result in named if result.evaluation == "long_perplexity"}:
        draw_positions(curves, output.with_suffix(".png"))
    return table


def result_files(sources: Sequence[str | Path]) -> list[Path]:
    """The result files meant by files and folders; a folder stands for all in it, by name.

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


def compare(results: Sequence[Result]) -> str:
    """A Markdown table: a row per evaluation, task, metric and arm, a column per checkpoint.

    Intervals are 95 %, as half their width behind ±, or as both ends where they are not even.

    Raises:
        ValueError: nothing to compare, or results of the same evaluation with other settings.
    """
    from nested_learning.report import markdown_table

    if not results:
        raise ValueError("no results to compare")
    _check_settings(results)
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
    """A number with its interval, short."""
    if metric.low is None or metric.high is None:
        return f"{metric.value:.4f}"
    down, up = metric.value - metric.low, metric.high - metric.value
    if abs(up - down) < 0.05 * (up + down):
        return f"{metric.value:.4f} ± {(up + down) / 2:.4f}"
    return f"{metric.value:.4f} ({metric.low:.4f} to {metric.high:.4f})"


def column_names(results: Sequence[Result]) -> list[str]:
    """A name per result, the same for the same checkpoint; a name that several have gets a piece of hash."""
    names = [result.checkpoint.get("name") or ", ".join(result.checkpoint) for result in results]
    hashes = [result.checkpoint.get("sha256", "")[:8] for result in results]
    owners: dict[str, set[str]] = {}
    for name, digest in zip(names, hashes, strict=True):
        owners.setdefault(name, set()).add(digest)
    return [
        f"{name} {digest}" if len(owners[name]) > 1 else name
        for name, digest in zip(names, hashes, strict=True)
    ]


def _check_settings(results: Sequence[Result]) -> None:
    """Numbers of other samples must not stand in one row."""
    first: dict[str, Result] = {}
    for result in results:
        other = first.setdefault(result.evaluation, result)
        for key in {**other.settings, **result.settings}:
            values = other.settings.get(key), result.settings.get(key)
            alone = key == "memorize" and None in values  # an arm that only one has stands by itself
            if key not in FREE and values[0] != values[1] and not alone:
                raise ValueError(
                    f"results of {result.evaluation} differ in {key} ({values[0]!r} and {values[1]!r}), "
                    "so their numbers cannot be compared"
                )
