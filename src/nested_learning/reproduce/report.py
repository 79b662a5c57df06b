"""What an experiment leaves behind: a table in Markdown, the same as JSON, and a picture."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nested_learning.report import markdown_table, new_figure

Points = list[tuple[float, float | None]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Plot:
    """A picture of lines. Lines of the same label share a colour and one entry in the legend.

    Args:
        lines: label and points; a point whose value is None is left out.
        log: axes with a logarithmic scale, of "", "x", "y", "xy".
    """

    lines: list[tuple[str, Points]]
    xlabel: str
    ylabel: str
    log: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """A table with a title and remarks, the numbers behind it, and perhaps a picture.

    Args:
        plot: lines to draw; several plots are drawn side by side.
        picture: draws what lines cannot show, to the path it is given.
    """

    title: str
    header: list[str]
    rows: list[list[str]]
    numbers: list[dict[str, Any]]
    notes: list[str] = field(default_factory=list)
    plot: Plot | tuple[Plot, ...] | None = None
    picture: Callable[[Path], None] | None = None

    def markdown(self) -> str:
        """Title, remarks and table."""
        remarks = "".join(f"{note}\n" for note in self.notes)
        return f"# {self.title}\n\n{remarks}\n{markdown_table(self.header, self.rows)}"

    def write(self, folder: Path) -> None:
        """Write `results.json`, `results.md` and, with a picture, `results.png` to `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        content = {"title": self.title, "notes": self.notes, "rows": self.numbers}
        (folder / "results.json").write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
        (folder / "results.md").write_text(self.markdown(), encoding="utf-8")
        if self.plot is not None:
            plots = (self.plot,) if isinstance(self.plot, Plot) else self.plot
            draw(plots, folder / "results.png")
        if self.picture is not None:
            self.picture(folder / "results.png")


def draw(plots: Sequence[Plot], path: Path) -> None:
    """Draw `plots` side by side as a PNG."""
    figure = new_figure(8 * len(plots), 4.5)
    for axes, plot in zip(figure.subplots(1, len(plots), squeeze=False)[0], plots, strict=True):
        _draw_lines(axes, plot)
    figure.savefig(path, dpi=120)


def _draw_lines(axes: Any, plot: Plot) -> None:
    colours: dict[str, str] = {}
    for label, points in plot.lines:
        known = [(x, y) for x, y in points if y is not None]
        first = label not in colours
        colour = colours.setdefault(label, f"C{len(colours)}")
        xs, ys = [x for x, _ in known], [y for _, y in known]
        axes.plot(xs, ys, color=colour, label=label if first else None, linewidth=1, marker=".")
    if "x" in plot.log:
        axes.set_xscale("log", base=2)
    if "y" in plot.log:
        axes.set_yscale("log")
    axes.set(xlabel=plot.xlabel, ylabel=plot.ylabel)
    axes.legend(fontsize="small")
