"""Packing: which pieces of documents share a row, and at which positions they begin.

Best fit, longest pieces first: a piece goes to the row that has the least room left after it. Every piece
begins at a multiple of a block, which the memories of a model require, and at least one position of padding
separates it from the next piece, so that `split_documents` can tell them apart.
"""

from __future__ import annotations

from bisect import bisect_left, insort

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nested_learning.data.padding import IGNORE

IntArray = npt.NDArray[np.int64]


class Packing:
    """Rows of `width` positions, and the pieces in each.

    Args:
        lengths: tokens of every piece `[N]`, at most `width`.
        width: positions of a row.
        block: pieces begin at multiples of it.
    """

    def __init__(self, lengths: IntArray, width: int, block: int) -> None:
        self.owner, self.place = _best_fit(lengths, width, block)
        self._order = np.lexsort((self.place, self.owner))
        self._ends = np.cumsum(np.bincount(self.owner, minlength=1))

    def __len__(self) -> int:
        """Number of rows."""
        return len(self._ends) if len(self.owner) else 0

    def pieces(self, row: int) -> IntArray:
        """Numbers of the pieces of a row, from left to right."""
        first = int(self._ends[row - 1]) if row else 0
        return self._order[first : int(self._ends[row])]


def _best_fit(lengths: IntArray, width: int, block: int) -> tuple[IntArray, IntArray]:
    """Row and position of every piece, `[N]` each; rows are numbered by their first piece."""
    owner, place = np.zeros(len(lengths), np.int64), np.zeros(len(lengths), np.int64)
    open_rows: dict[int, list[int]] = {}  # room left → rows that have it
    rooms: list[int] = []  # their keys, sorted
    rows = 0
    for piece in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[piece])
        at = bisect_left(rooms, length)
        if at < len(rooms):
            room = rooms[at]
            row = open_rows[room].pop()
            if not open_rows[room]:
                del open_rows[room], rooms[at]
        else:
            room, row, rows = width, rows, rows + 1
        owner[piece], place[piece] = row, width - room
        left = room - -(-(length + 1) // block) * block
        if left > 1:  # a piece of one token would have no target
            if left not in open_rows:
                insort(rooms, left)
                open_rows[left] = []
            open_rows[left].append(row)
    first = np.full(rows, len(lengths), np.int64)
    np.minimum.at(first, owner, np.arange(len(lengths)))
    number = np.empty(rows, np.int64)
    number[np.argsort(first, kind="stable")] = np.arange(rows)
    return number[owner] if rows else owner, place


def split_documents(batch: Tensor) -> Tensor:
    """The number of the document that each token of a batch `[B, T + 1]` belongs to: `[B, T]`, per row.

    A document begins with the first token after padding; padding belongs to the document before it.
    """
    inside = batch[:, :-1] != IGNORE
    begins = inside[:, 1:] & ~inside[:, :-1]
    return torch.nn.functional.pad(begins.cumsum(1), (1, 0))
