"""Draw how documents become rows, from the rows that a loader would give.

uv run nl data draw-rows --output docs/images/rows.png
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from nested_learning.checks import at_least
from nested_learning.command import Parser
from nested_learning.data.mixture import Rows
from nested_learning.data.padding import IGNORE
from nested_learning.data.shards import DIGEST_BYTES, ShardSet, shard_file
from nested_learning.report import new_figure

DOCUMENTS = (21, 9, 38, 14, 6, 25)
"""Tokens of the example's documents, end tokens included."""


def main() -> None:
    """Draw the picture."""
    parser = Parser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seq-len", type=int, default=24)
    parser.add_argument("--chunk-size", type=int, default=8)
    options = parser.parse_args()
    at_least("--seq-len", options.seq_len, 1)
    at_least("--chunk-size", options.chunk_size, 1)
    draw_rows(options.output, options.seq_len, options.chunk_size)


def draw_rows(path: Path, seq_len: int = 24, chunk_size: int = 8) -> None:
    """Write a PNG: the rows of an example's documents with crossing, one to a row, and packed.

    Colours are documents, a white edge is an end token, dashes are ends of chunks, crosses are padding, and a
    black bar is where the state resets.
    """
    owner = np.repeat(np.arange(len(DOCUMENTS)), DOCUMENTS)
    with tempfile.TemporaryDirectory() as scratch:
        tokens = _example(Path(scratch), owner)
        rows = {
            "crossing = true: every row full,\nmemories reach over documents": Rows(tokens, seq_len, True),
            "crossing = false: one document in a row,\nthe rest is padding (×)": Rows(tokens, seq_len, False),
            "and packing = true: several in a row,\neach from the start of a chunk": Rows(
                tokens, seq_len, False, chunk_size
            ),
        }
        tables = {title: np.stack([found[i] for i in range(len(found))]) for title, found in rows.items()}
    figure = new_figure(14, 4)
    axes = figure.subplots(1, 3)
    for axis, (title, table) in zip(axes, tables.items(), strict=True):
        _draw_table(axis, table, chunk_size)
        axis.set_title(title, fontsize=10)
    axes[0].set_ylabel("rows (sequences) of a batch")
    for axis in axes:
        axis.set_ylim(max(len(table) for table in tables.values()), 0)
    figure.suptitle(
        f"{len(DOCUMENTS)} documents as sequences of {seq_len} tokens (and one more, the last target), "
        f"chunks of {chunk_size}; the state resets at black bars",
        fontsize=11,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _example(folder: Path, owner: Any) -> ShardSet:
    """Shards in which a token is 10 times its document's number, plus 1 at the end of the document."""
    ends = np.cumsum(DOCUMENTS) - 1
    tokens = (owner * 10).astype("<u2")
    tokens[ends] += 1
    tokens.tofile(shard_file(folder, "train", 0))
    (ends + 1 - np.asarray(DOCUMENTS)).astype("<u8").tofile(folder / "train.starts")
    (folder / "train.hashes").write_bytes(bytes(DIGEST_BYTES * len(DOCUMENTS)))
    return ShardSet(folder, "train", "<u2", [len(tokens)])


def _draw_table(axis: Any, table: Any, chunk_size: int) -> None:
    """`table [rows, seq_len + 1]` as coloured squares."""
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    palette = colormaps["tab10"]
    for y, row in enumerate(table.tolist()):
        for x, token in enumerate(row):
            padding = token == IGNORE
            face = "white" if padding else palette(token // 10)
            axis.add_patch(Rectangle((x, y), 1, 1, facecolor=face, edgecolor="0.85", linewidth=0.5))
            if padding:
                axis.text(x + 0.5, y + 0.5, "×", ha="center", va="center", color="0.6", fontsize=8)
            elif token % 10:
                axis.add_patch(Rectangle((x + 0.78, y + 0.04), 0.2, 0.92, facecolor="white"))
        for x, token in enumerate(row):
            if x == 0 or (token != IGNORE and row[x - 1] == IGNORE):
                axis.plot([x, x], [y + 0.05, y + 0.95], color="black", linewidth=4)
    width = table.shape[1]
    for x in range(chunk_size, width, chunk_size):
        axis.axvline(x, color="black", linestyle="--", linewidth=0.8)
    axis.set_xlim(-0.3, width)
    axis.set_ylim(len(table), 0)
    axis.set_yticks([])
    axis.set_xticks(range(0, width, chunk_size))
    axis.set_xlabel("token of the row")
