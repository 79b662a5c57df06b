"""The pictures of reports: curves of one run, and of several over each other.

They have no background, so that a page can show them in the dark.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nested_learning.report import new_figure
from nested_learning.reporting.run import Points, RunRecord, smooth, smoothing_window, training_seconds
from nested_learning.train.plots import calendar_figure

PANELS = (
    ("lr", "learning rate"),
    ("grad_norm", "gradient norm before clipping"),
    ("tokens_per_second", "tokens per second"),
    ("memory_gib", "highest memory so far (GiB)"),
)
"""Keys of `metrics.jsonl`, and what they are called; drawn two in a row."""
SHOWN_SEQUENCES = 2  # of a calendar, unless slow levels need more
MOST_SEQUENCES = 8


def loss_figure(record: RunRecord) -> Any:
    """Training loss, as logged and smoothed, validation loss, and where the run was resumed."""
    figure, axes = _one(9, 4)
    losses = record.series("loss")
    window = smoothing_window(losses)
    _line(axes, losses, "training", color="C0", alpha=0.35, linewidth=1)
    _line(axes, smooth(losses, window), f"training, mean of {window} logged", color="C0")
    _line(axes, record.series("valid_loss"), "validation", color="C1", marker="o", markersize=4)
    for number, step in enumerate(start["step"] for start in record.starts[1:]):
        label = None if number else "resumed"
        axes.axvline(step, color="grey", linestyle=":", linewidth=1, label=label)
    return _named(figure, axes, "step", "loss (nats per token)")


def panels_figure(record: RunRecord) -> Any:
    """Learning rate, gradient norm, speed and memory over steps; a panel without points says so."""
    figure = _clear(new_figure(9, 5))
    for axes, (key, title) in zip(figure.subplots(2, 2).flatten(), PANELS, strict=True):
        points = record.series(key)
        _line(axes, points, None, color="C0", linewidth=1.2)
        axes.set_title(title if points else f"{title}: not recorded", fontsize="medium")
        axes.set_ylim(0, 1.08 * max((value for _, value in points), default=1) or 1)
        axes.set_xlabel("step")
        _clear_axes(axes)
    return figure


def level_keys(record: RunRecord) -> list[str]:
    """Names of the levels of which the metrics say how far they move."""
    found = (key.split("/") for row in record.rows for key in row)
    return list(dict.fromkeys(parts[1] for parts in found if parts[0] == "level" and len(parts) == 3))


def levels_figure(record: RunRecord) -> Any:
    """Change of the memory of every level, and how much the loss rises without it, over steps."""
    figure = _clear(new_figure(9, 3.4))
    left, right = figure.subplots(1, 2)
    for number, level in enumerate(level_keys(record)):
        style = {"color": f"C{number}", "marker": "o", "markersize": 3}
        _line(left, record.series(f"level/{level}/change"), level, **style)
        _line(right, record.series(f"level/{level}/frozen_loss_rise"), level, **style)
    left.set_title("change, over the norm at the start", fontsize="medium")
    left.set_yscale("log")
    right.set_title("rise of the loss with the level frozen (nats)", fontsize="medium")
    right.axhline(0, color="grey", linewidth=0.8)
    for axes in (left, right):
        axes.set_xlabel("step")
        axes.legend(fontsize="small", framealpha=0)
        _clear_axes(axes)
    return figure


def calendar_picture(record: RunRecord) -> tuple[Any, int]:
    """When which level is written, over as many training sequences as are needed; and how many these are."""
    assert record.config is not None
    model, length = record.config.model, record.config.train.seq_len
    periods = [level.chunk_size or 0 for level in model.levels]
    count = min(max(SHOWN_SEQUENCES, -(-max(periods) // length)), MOST_SEQUENCES)
    figure = calendar_figure([level.name for level in model.levels], model.calendar(count * length), "")
    for axes in _clear(figure).axes:
        for number in range(1, count):
            axes.axvline(number * length, color="grey", linestyle=":", linewidth=1)
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small", framealpha=0)
        _clear_axes(axes)
    return figure, count


def comparison_figure(runs: Mapping[str, RunRecord]) -> Any:
    """Validation losses of several runs over steps and over training time, and smoothed training losses."""
    figure = _clear(new_figure(10, 4.2))
    all_axes = figure.subplots(1, 3, sharey=True)
    for number, (label, record) in enumerate(runs.items()):
        style: dict[str, Any] = {"color": f"C{number}", "marker": "o", "markersize": 3}
        losses, valid = record.series("loss"), record.series("valid_loss")
        _line(all_axes[0], valid, label, **style)
        _line(all_axes[1], over_time(valid, training_seconds(record.rows)), label, **style)
        _line(all_axes[2], smooth(losses, smoothing_window(losses)), label, color=f"C{number}")
    titles = ("validation loss", "validation loss", "training loss, smoothed")
    xlabels = ("step", "minutes of training", "step")
    for axes, title, xlabel in zip(all_axes, titles, xlabels, strict=True):
        axes.set_title(title, fontsize="medium")
        axes.set_xlabel(xlabel)
        _clear_axes(axes)
    all_axes[0].set_ylabel("nats per token")
    if all_axes[0].lines or all_axes[2].lines:
        shown = all_axes[0] if all_axes[0].lines else all_axes[2]
        shown.legend(fontsize="small", framealpha=0)
    return figure


def over_time(points: Points, seconds: Points) -> Points:
    """`points` with minutes of training in place of steps: the time of the last logged step until then."""
    found = []
    for step, value in points:
        before = [time for at, time in seconds if at <= step]
        if before:
            found.append((before[-1] / 60, value))
    return found


def curves_figure(curves: Sequence[tuple[str, Points]], xlabel: str = "step") -> Any:
    """The evaluations of many runs in one picture. Curves of the same label share a colour."""
    figure, axes = _one(9, 4.4)
    colours: dict[str, str] = {}
    for label, points in curves:
        first = label not in colours
        colour = colours.setdefault(label, f"C{len(colours) % 10}")
        _line(axes, points, label if first else None, color=colour, marker=".", linewidth=1)
    axes.set(xlabel=xlabel, ylabel="evaluation")
    _clear_axes(axes)
    if len(colours) > 1:
        axes.legend(fontsize="small", framealpha=0, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _one(width: float, height: float) -> tuple[Any, Any]:
    figure = _clear(new_figure(width, height))
    return figure, figure.add_subplot()


def _line(axes: Any, points: Points, label: str | None, **style: Any) -> None:
    if points:
        xs, ys = zip(*points, strict=True)
        axes.plot(xs, ys, label=label, **style)


def _named(figure: Any, axes: Any, xlabel: str, ylabel: str) -> Any:
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.legend(framealpha=0)
    _clear_axes(axes)
    return figure


def _clear(figure: Any) -> Any:
    figure.patch.set_alpha(0)
    return figure


def _clear_axes(axes: Any) -> None:
    axes.patch.set_alpha(0)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
