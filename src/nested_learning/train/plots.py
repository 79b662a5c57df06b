"""The pictures of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nested_learning.levels import Event
from nested_learning.report import new_figure
from nested_learning.train.metrics import read_metrics

EVENT_COLOURS = {"update": "C0", "reset": "C3", "step": "C2"}


def plot_losses(metrics: Path, output: Path, unigram_entropy: float) -> None:
    """Training and validation loss over steps as a PNG, in nats per token.

    Args:
        metrics: a `metrics.jsonl`.
        output: the file to write.
        unigram_entropy: nats per token that guessing by token frequency costs: the line to get below.
    """
    rows = read_metrics(metrics)
    figure = new_figure(7, 4)
    axes = figure.add_subplot()
    for key, label, style in (("loss", "training", "-"), ("valid_loss", "validation", "o-")):
        points = [(row["step"], row[key]) for row in rows if key in row]
        if points:
            steps, values = zip(*points, strict=True)
            axes.plot(steps, values, style, label=label, markersize=4)
    axes.axhline(unigram_entropy, color="grey", linestyle="--", label="unigram entropy")
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.legend()
    figure.savefig(output, dpi=120)


def plot_jobs(runs: Mapping[str, Path], output: Path) -> None:
    """Validation losses over steps of several runs as a PNG; nothing is written if there are none.

    Args:
        runs: label → a `metrics.jsonl`.
        output: the file to write.
    """
    figure = new_figure(7, 4)
    axes = figure.add_subplot()
    for label, metrics in runs.items():
        points = [(row["step"], row["valid_loss"]) for row in read_metrics(metrics) if "valid_loss" in row]
        if points:
            axes.plot(*zip(*points, strict=True), "o-", label=label, markersize=4)
    if axes.lines:
        axes.set(xlabel="step", ylabel="validation loss (nats per token)")
        axes.legend()
        figure.savefig(output, dpi=120)


def calendar_figure(levels: Sequence[str], events: Sequence[Event], title: str) -> Any:
    """When which level is written, as a matplotlib figure: a row per level, a mark per event.

    Args:
        levels: their names, from the top.
        events: of a calendar; see `levels.calendar`.
        title: above the figure.
    """
    figure = new_figure(9, 1.2 + 0.5 * len(levels))
    axes = figure.add_subplot()
    for kind, colour in EVENT_COLOURS.items():
        marked = [(e.token, levels.index(e.level)) for e in events if e.kind == kind]
        if marked:
            xs, ys = zip(*marked, strict=True)
            axes.scatter(xs, ys, marker="|", s=160, color=colour, label=kind)
    axes.set_yticks(range(len(levels)), levels)
    axes.set(xlabel="tokens", title=title, ylim=(-0.6, len(levels) - 0.4))
    axes.set_xlim(left=0)
    axes.invert_yaxis()
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small")
    return figure
