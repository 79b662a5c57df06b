"""Figures of evaluations, as PNG files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nested_learning.report import new_figure


def draw_maps(
    maps: Mapping[str, Sequence[Sequence[float | None]]],
    lengths: Sequence[int],
    depths: Sequence[float],
    path: Path,
) -> None:
    """Draw accuracies between 0 and 1 by depth (down) and length (right), a panel per map.

    Args:
        maps: title, and for every length the values of all depths; None where nothing was measured.
    """
    across = min(4, len(maps))
    down = -(-len(maps) // across)
    size = 1 + (1.2 + 0.7 * len(lengths)) * across, (1.5 + 0.4 * len(depths)) * down
    figure = new_figure(*size)
    grid_of_panels = figure.subplots(down, across, squeeze=False)
    panels = grid_of_panels.flatten()
    for unused in panels[len(maps) :]:
        unused.set_visible(False)
    for panel, (title, values) in zip(panels[: len(maps)], maps.items(), strict=True):
        grid = [[float("nan") if v is None else v for v in column] for column in zip(*values, strict=True)]
        image = panel.imshow(grid, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        for row, column in ((i, j) for i in range(len(depths)) for j in range(len(lengths))):
            value = values[column][row]
            if value is not None:
                colour = "white" if value < 0.6 else "black"
                panel.text(column, row, f"{value:.2f}", ha="center", va="center", color=colour, size="small")
        panel.set_title(title, fontsize="medium")
        panel.set_xticks(range(len(lengths)), [str(length) for length in lengths])
        panel.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
        panel.set_xlabel("tokens")
    for row in grid_of_panels:
        row[0].set_ylabel("depth of the needle")
    figure.colorbar(image, ax=grid_of_panels, label="retrieved")
    figure.savefig(path, dpi=120)


def plot_forgetting(
    matrix: Sequence[Sequence[float]],
    checkpoints: Sequence[str],
    segments: Sequence[str],
    path: Path,
    label: str = "loss (nats per token)",
) -> None:
    """Draw `matrix[checkpoint][segment]` as a map and as a line per segment over the checkpoints."""
    figure = new_figure(
        4 + 1.1 * len(segments) + 0.6 * len(checkpoints), 1.8 + 0.5 * max(4, len(checkpoints))
    )
    left, right = figure.subplots(1, 2)
    image = left.imshow(matrix, cmap="viridis", aspect="auto")
    middle = (image.norm.vmin + image.norm.vmax) / 2
    _numbers(left, matrix, middle)
    left.set_xticks(range(len(segments)), list(segments), rotation=20)
    left.set_yticks(range(len(checkpoints)), list(checkpoints))
    left.set(xlabel="scored on", ylabel="checkpoint")
    _lines(right, matrix, checkpoints, segments)
    right.set(xlabel="checkpoint", ylabel=label)
    right.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def draw_matrices(
    panels: Mapping[str, Sequence[Sequence[float]]],
    changes: Mapping[str, Sequence[float]],
    checkpoints: Sequence[str],
    texts: Sequence[str],
    path: Path,
) -> None:
    """Draw `panels[model][checkpoint][text]` as maps on one scale, and `changes[model][text]` as bars."""
    size = 1.2 + 0.9 * len(texts)
    figure = new_figure(size * (len(panels) + 1.4), 1.8 + 0.5 * max(3, len(checkpoints)))
    widths = [1.0] * len(panels) + [1.4]
    *maps, bars = figure.subplots(1, len(panels) + 1, width_ratios=widths)
    values = [value for matrix in panels.values() for row in matrix for value in row]
    for axes, (title, matrix) in zip(maps, panels.items(), strict=True):
        axes.imshow(matrix, vmin=min(values), vmax=max(values), cmap="viridis", aspect="auto")
        _numbers(axes, matrix, (min(values) + max(values)) / 2)
        axes.set_title(title, fontsize="medium")
        axes.set_xticks(range(len(texts)), list(texts))
        axes.set_yticks(range(len(checkpoints)), [f"after {name}" for name in checkpoints])
        axes.set_xlabel("loss on")
    for axes in maps[1:]:
        axes.set_yticklabels([])
    width = 0.8 / len(changes)
    for i, (title, heights) in enumerate(changes.items()):
        places = [j + width * (i - (len(changes) - 1) / 2) for j in range(len(texts))]
        drawn = bars.bar(places, heights, width * 0.95, label=title)
        bars.bar_label(drawn, fmt="%+.2f", padding=2, fontsize="small")
    bars.axhline(0, color="black", linewidth=0.8)
    bars.margins(y=0.15)
    bars.set_xticks(range(len(texts)), list(texts))
    bars.set(ylabel="nats per token")
    bars.set_title("change: above 0 = forgotten, below = learned", fontsize="medium")
    bars.legend(fontsize="small")
    figure.savefig(path, dpi=110)


def _numbers(axes: Any, matrix: Sequence[Sequence[float]], middle: float) -> None:
    """Write the values into a map: white on the dark half of its scale."""
    for i, row in enumerate(matrix):
        for j, value in enumerate(row):
            colour = "white" if value < middle else "black"
            axes.text(j, i, f"{value:.3f}", ha="center", va="center", color=colour, size="small")


def draw_forgetting(
    panels: Mapping[str, Sequence[Sequence[float]]], segments: Sequence[str], path: Path, label: str
) -> None:
    """Draw `matrix[i][j]`, the value on segment j after learning segment i, as lines: a panel per matrix."""
    figure = new_figure(1 + 2.6 * len(panels), 3.6)
    all_axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axes, (title, matrix) in zip(all_axes, panels.items(), strict=True):
        _lines(axes, matrix, segments, segments)
        axes.set_title(title, fontsize="medium")
        axes.set_xlabel("after learning")
    all_axes[0].set_ylabel(label)
    all_axes[0].legend(fontsize="small")
    figure.savefig(path, dpi=120)


def _lines(
    axes: Any, matrix: Sequence[Sequence[float]], stages: Sequence[str], segments: Sequence[str]
) -> None:
    for j, segment in enumerate(segments):
        axes.plot(range(len(stages)), [row[j] for row in matrix], marker=".", label=segment)
    axes.set_xticks(range(len(stages)), list(stages), rotation=20)


def draw_accuracies(curves: Mapping[str, Sequence[float]], classes: Sequence[int], path: Path) -> None:
    """Draw accuracy over the number of classes seen so far, a line per method; dotted: guessing."""
    figure = new_figure(7, 4.2)
    axes = figure.add_subplot()
    for name, values in curves.items():
        axes.plot(classes, values, marker=".", label=name.replace("_", " "))
    axes.plot(classes, [1 / count for count in classes], color="grey", linestyle=":", label="guessing")
    axes.set(xlabel="classes seen so far, all of them candidates", ylabel="accuracy", ylim=(0, 1))
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
