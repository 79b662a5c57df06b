"""Tables, numbers and figures of everything that reports results."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""97.5 % quantiles of Student's t with 1, 2, … degrees of freedom."""


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table that also reads well as plain text; it ends with a newline.

    The first column is aligned to the left, the others to the right. A `|` in a cell is escaped.

    Raises:
        ValueError: a row with more or fewer cells than the header.
    """
    for row in rows:
        if len(row) != len(header):
            raise ValueError(f"a row has {len(row)} cells, the header has {len(header)}: {list(row)}")
    lines = [[cell.replace("|", "\\|") for cell in cells] for cells in (header, *rows)]
    widths = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "".join(_table_line(cells, widths) for cells in (lines[0], rule, *lines[1:]))


def _table_line(cells: Sequence[str], widths: Sequence[int]) -> str:
    right = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
    return "| " + " | ".join([cells[0].ljust(widths[0]), *right]) + " |\n"


def show(value: float | None, digits: int = 4) -> str:
    """A number for a table. None, which stands for a number that is not finite, becomes "not finite"."""
    return "not finite" if value is None else f"{value:.{digits}f}"


def mean(values: Sequence[float | None]) -> float | None:
    """The mean, or None if one of the values is None."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if len(known) == len(values) else None


def highest(values: Sequence[float | None]) -> float | None:
    """The highest value that is not None, or None if there is no such value."""
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


def new_figure(width: float, height: float) -> Any:
    """An empty matplotlib figure, `width` × `height` inches, that is drawn without a screen."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def duration(seconds: float) -> str:
    """A time such as "0:07", "3:20" or "2:05:09"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
