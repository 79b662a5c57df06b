"""docs/images/glossary.png: sequence, segment, chunk, document, context, level, reset and state.

uv run python scripts/docs/glossary_picture.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nested_learning.report import new_figure

TARGET = Path(__file__).resolve().parents[2] / "docs" / "images" / "glossary.png"
TOKENS, CHUNK = 32, 4
RESET = "reset: back to its initial weights (nested levels)"
STEP = "The optimizer steps once after the sequence: one step of the run; plain and slow levels change then."
INK, SOFT, BLUE, ORANGE, GREEN = "#22272e", "#8b949e", "#4c78a8", "#e08214", "#4d9a58"


def draw() -> Any:
    """The figure."""
    figure = new_figure(11, 6.2)
    axes = figure.subplots()
    axes.set_xlim(-6.2, TOKENS + 0.5)
    axes.set_ylim(-0.6, 10.6)
    axes.axis("off")
    for row, label in enumerate(("row 0", "row 1")):
        bottom = 8.3 - 1.1 * row
        for token in range(TOKENS):
            second = row == 1 and token >= 12
            colour = "#dbe7f3" if not second else "#f7dfc3"
            axes.add_patch(_box(token, bottom, 1, 0.8, colour))
        axes.text(-0.4, bottom + 0.4, label, ha="right", va="center", color=INK)
    axes.text(6, 7.6, "a document", ha="center", va="center", color=INK, fontsize=9)
    axes.text(
        22, 7.6, "another document: a context of its own", ha="center", va="center", color=INK, fontsize=9
    )
    _span(axes, 0, TOKENS, 9.8, "sequence: the tokens of a row in one training step")
    axes.text(-3.4, 8.15, "batch", ha="right", va="center", color=INK, fontsize=9, weight="bold")
    _span(axes, 0, 16, 6.2, "segment: read in one call")
    _span(axes, 16, TOKENS, 6.2, "the next segment goes on from the state")
    _label(axes, 6.2, "cuts")
    _label(axes, 4.9, "chunks of a memory")
    for chunk in range(TOKENS // CHUNK):
        axes.add_patch(_box(chunk * CHUNK, 4.55, CHUNK, 0.7, "#eef1f4"))
        axes.text(chunk * CHUNK + CHUNK / 2, 4.9, "read", ha="center", va="center", color=SOFT, fontsize=9)
        _mark(axes, (chunk + 1) * CHUNK, 4.3, BLUE, "^")
    axes.text(TOKENS, 3.95, "write: at the end of a chunk", ha="right", va="center", color=BLUE, fontsize=9)
    for height, period, name in ((3.1, 8, "fast level, period 8"), (2.2, 16, "slower level, period 16")):
        _label(axes, height, name)
        axes.plot([0, TOKENS], [height, height], color=SOFT, lw=1)
        for end in range(period, TOKENS + 1, period):
            _mark(axes, end, height, ORANGE, "o")
    for end in (16, 32):
        _mark(axes, end, 3.1, GREEN, "s")
    axes.text(
        16.4, 3.5, "reset: back to its initial weights (nested levels)", color=GREEN, fontsize=9, va="center"
    )
    _label(axes, 1.1, "state")
    axes.annotate("", (TOKENS, 1.1), (0, 1.1), arrowprops={"arrowstyle": "->", "color": INK, "lw": 1.5})
    axes.text(0, 0.55, "None: start of a context", color=INK, fontsize=9, va="center")
    axes.text(
        TOKENS,
        0.55,
        "all memories of every row: it comes out of a call and goes into the next",
        ha="right",
        color=INK,
        fontsize=9,
        va="center",
    )
    axes.text(
        0,
        -0.25,
        STEP,
        color=SOFT,
        fontsize=9,
        va="center",
    )
    return figure


def _box(x: float, y: float, width: float, height: float, colour: str) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x, y), width, height, facecolor=colour, edgecolor="white", lw=1.2)


def _span(axes: Any, start: float, end: float, height: float, words: str) -> None:
    axes.annotate("", (end, height), (start, height), arrowprops={"arrowstyle": "<->", "color": INK})
    axes.text((start + end) / 2, height + 0.32, words, ha="center", va="center", color=INK, fontsize=9)


def _label(axes: Any, height: float, words: str) -> None:
    axes.text(-0.6, height, words, ha="right", va="center", color=INK, fontsize=9, weight="bold")


def _mark(axes: Any, x: float, y: float, colour: str, shape: str) -> None:
    axes.plot([x], [y], shape, color=colour, markersize=6, clip_on=False)


if __name__ == "__main__":
    draw().savefig(TARGET, dpi=110)
