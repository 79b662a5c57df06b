"""Pictures of evaluations, as PNG files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def new_figure(width: float, height: float) -> Any:
    """An empty matplotlib figure that draws without a screen."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


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
    width = 1.2 + 0.7 * len(lengths)
    figure = new_figure(1 + width * len(maps), 1.5 + 0.4 * len(depths))
    panels = figure.subplots(1, len(maps), squeeze=False)[0]
    for panel, (title, values) in zip(panels, maps.items(), strict=True):
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
    panels[0].set_ylabel("depth of the needle")
    figure.colorbar(image, ax=panels, label="retrieved")
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
    for i, row in enumerate(matrix):
        for j, value in enumerate(row):
            colour = "white" if value < middle else "black"
            left.text(j, i, f"{value:.3f}", ha="center", va="center", color=colour, size="small")
    left.set_xticks(range(len(segments)), list(segments), rotation=20)
    left.set_yticks(range(len(checkpoints)), list(checkpoints))
    left.set(xlabel="scored on", ylabel="checkpoint")
    for j, segment in enumerate(segments):
        right.plot(range(len(checkpoints)), [row[j] for row in matrix], marker=".", label=segment)
    right.set_xticks(range(len(checkpoints)), list(checkpoints), rotation=20)
    right.set(xlabel="checkpoint", ylabel=label)
    right.legend(fontsize="small")
    figure.savefig(path, dpi=120)
