"""What an experiment leaves behind: a table in Markdown, the same as JSON, and a picture."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""97.5 % quantiles of Student's t with 1, 2, … degrees of freedom."""
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
        plot: lines to draw; picture: draws what lines cannot show, to the path it is given.
    """

    title: str
    header: list[str]
    rows: list[list[str]]
    numbers: list[dict[str, Any]]
    notes: list[str] = field(default_factory=list)
    plot: Plot | None = None
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
            draw(self.plot, folder / "results.png")
        if self.picture is not None:
            self.picture(folder / "results.png")


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, first column left-aligned, the others right-aligned, padded to read well as text."""
    for row in rows:
        if len(row) != len(header):
            raise ValueError(f"a row has {len(row)} cells, the header has {len(header)}: {list(row)}")
    widths = [max(3, *(len(line[i]) for line in (header, *rows))) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cells[0].ljust(widths[0]),
            *(c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True)),
        ]
        return "| " + " | ".join(padded) + " |\n"

    rule = ["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])]
    return "".join(line(cells) for cells in (header, rule, *rows))


def show(value: float | None, digits: int = 4) -> str:
    """A number for a table; None, which stands for one that is not finite, as words."""
    return "not finite" if value is None else f"{value:.{digits}f}"


def mean(values: Sequence[float | None]) -> float | None:
    """Mean, or None if one of the values is None."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if len(known) == len(values) else None


def highest(values: Sequence[float | None]) -> float | None:
    """The highest of those that are not None; None if all are."""
    return max((value for value in values if value is not None), default=None)


def interval(values: Sequence[float | None], style: str = ".4f") -> str:
    """Mean ± half the width of its 95 % interval (Student's t); the mean alone for a single value."""
    average = mean(values)
    if average is None:
        return show(None)
    if len(values) < 2:
        return f"{average:{style}}"
    known = [value for value in values if value is not None]
    free = len(known) - 1
    quantile = STUDENT[free - 1] if free <= len(STUDENT) else 1.96 + 2.7 / free
    half = quantile * statistics.stdev(known) / math.sqrt(len(known))
    return f"{average:{style}} ± {half:{style}}"


def draw(plot: Plot, path: Path) -> None:
    """Draw `plot` as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
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
    figure.savefig(path, dpi=120)
