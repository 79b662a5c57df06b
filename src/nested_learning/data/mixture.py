"""Rows of batches from one or several token sets, as an endless sequence with random access.

A row is `seq_len + 1` token ids. Rows of a set are either windows over its stream of tokens, or documents
(`crossing=False`), one or several in a row; the rest of a row is padding, `IGNORE`. Several sets are mixed
either evenly (every row of all sets once per epoch) or by weight (every row of a set once per epoch of that
set, with sets taking turns in the ratio of their weights).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from nested_learning.data.packing import IntArray, Packing
from nested_learning.data.padding import IGNORE
from nested_learning.data.shards import ShardSet, TokenArray, Tokens

PATTERN = 4096
"""Period of the turns of a weighted mixture; weights are exact to 1 in 4096."""


class TokenMixture(Tokens):
    """Token sets with weights; as one array, they are concatenated.

    Args:
        sets: at least one.
        weights: relative shares of the rows; None = every row of all sets equally often.

    Raises:
        ValueError: no set, or weights that are not positive or not one for each set.
    """

    def __init__(self, sets: Sequence[TokenArray | ShardSet], weights: Sequence[float] | None = None) -> None:
        if not sets:
            raise ValueError("a mixture needs at least one set of tokens")
        if weights is not None and (len(weights) != len(sets) or not all(weight > 0 for weight in weights)):
            raise ValueError(
                f"weights must be positive, one for each of {len(sets)} token sets, got {list(weights)}"
            )
        super().__init__(sets)
        self.sets = list(sets)
        self.weights = None if weights is None else [float(weight) for weight in weights]


class Rows:
    """The rows of one token set: `rows[k]` is `[seq_len + 1]` int64.

    Args:
        tokens: the set.
        seq_len: inputs of a row.
        crossing: rows are windows over the stream of tokens.
        block: without crossing, several documents share a row and begin at multiples of this number; None =
            one document per row.

    Raises:
        ValueError: `crossing=False` with a set that does not know where its documents start.
    """

    def __init__(
        self, tokens: TokenArray | Tokens, seq_len: int, crossing: bool, block: int | None = None
    ) -> None:
        self._tokens, self._seq_len, self._crossing = tokens, seq_len, crossing
        self._packing: Packing | None = None
        if crossing:
            self._count = len(tokens) // (seq_len + 1)
            return
        if not isinstance(tokens, ShardSet):
            raise ValueError(
                "loader.crossing = false needs tokens that know their documents: data.shards, not data.files"
            )
        self._starts = np.append(tokens.starts, np.uint64(len(tokens))).astype(np.int64)
        targets = np.diff(self._starts) - 1  # the first token of a document is not a target
        self._first = np.concatenate([[0], np.cumsum(np.maximum(1, -(-targets // seq_len)))])
        self._count = int(self._first[-1])
        if block is not None:
            self._packing = Packing(self._piece(np.arange(self._count))[1], seq_len + 1, block)
            self._count = len(self._packing)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, row: int) -> IntArray:
        """Row `row`, padded with `IGNORE`; the last token of a row of a long document begins the next row."""
        width = self._seq_len + 1
        if self._crossing:
            return self._tokens[row * width : (row + 1) * width].astype(np.int64)
        full = np.full(width, IGNORE, np.int64)
        if self._packing is None:
            pieces, places = np.asarray([row]), np.zeros(1, np.int64)
        else:
            pieces = self._packing.pieces(row)
            places = self._packing.place[pieces]
        for place, start, length in zip(places, *self._piece(pieces), strict=True):
            full[place : place + length] = self._tokens[int(start) : int(start + length)]
        return full

    def lengths(self, rows: IntArray) -> IntArray:
        """Positions of each of `rows [N]` up to its last token, `[N]`; a packed row counts as full."""
        if self._crossing or self._packing is not None:
            return np.full(len(rows), self._seq_len + 1)
        return self._piece(rows)[1]

    def padding(self) -> float:
        """Share of the positions of all rows that hold no token."""
        if self._crossing or not self._count:
            return 0.0
        pieces = np.arange(int(self._first[-1]))
        used = sum(int(self._piece(part)[1].sum()) for part in np.array_split(pieces, 64))
        return 1 - used / (self._count * (self._seq_len + 1))

    def _piece(self, pieces: IntArray) -> tuple[IntArray, IntArray]:
        """Start and length of pieces of documents; each fits a row and overlaps the next by one token."""
        document = np.searchsorted(self._first, pieces, side="right") - 1
        start = self._starts[document] + (pieces - self._first[document]) * self._seq_len
        return start, np.minimum(self._starts[document + 1] - start, self._seq_len + 1)


class RowSequence:
    """The endless sequence of rows of a mixture; row `place` is the same whenever and wherever it is read.

    Args:
        mixture: the token sets.
        seq_len, crossing, block: see `Rows`.
        seed: of the order of the rows.
        shuffle: draw another order for every epoch; otherwise rows keep their order.

    Raises:
        ValueError: a set without a single row in a weighted mixture.
    """

    def __init__(
        self,
        mixture: TokenMixture,
        seq_len: int,
        crossing: bool,
        seed: int,
        shuffle: bool,
        block: int | None = None,
    ) -> None:
        self._rows = [Rows(tokens, seq_len, crossing, block) for tokens in mixture.sets]
        self.counts = [len(rows) for rows in self._rows]
        self._seed, self._shuffle = seed, shuffle
        self._pattern = None
        self._orders: dict[int, tuple[int, IntArray]] = {}
        if mixture.weights is not None and len(mixture.sets) > 1:
            if 0 in self.counts:
                number = self.counts.index(0)
                raise ValueError(
                    f"token set {number} of the mixture has {len(mixture.sets[number])} tokens, "
                    f"no row of seq_len={seq_len} plus 1"
                )
            self._pattern = interleave(mixture.weights)
            self._before = np.stack([np.cumsum(self._pattern == i) for i in range(len(self.counts))], axis=1)
        self._ends = np.cumsum(self.counts)

    def __len__(self) -> int:
        """Number of rows of all sets."""
        return int(self._ends[-1])

    def find(self, place: int) -> tuple[int, int]:
        """The number of the set at `place`, and the row of that set."""
        if self._pattern is None:
            epoch, position = divmod(place, len(self))
            row = int(self._order(0, len(self), epoch)[position])
            number = int(np.searchsorted(self._ends, row, side="right"))
            return number, row - int(self._ends[number]) + self.counts[number]
        period, position = divmod(place, PATTERN)
        number = int(self._pattern[position])
        turn = period * int(self._before[-1, number]) + int(self._before[position, number]) - 1
        epoch, position = divmod(turn, self.counts[number])
        return number, int(self._order(number, self.counts[number], epoch)[position])

    def __getitem__(self, place: int) -> IntArray:
        """The row at `place`, `[seq_len + 1]`."""
        number, row = self.find(place)
        return self._rows[number][row]

    def lengths(self, places: Sequence[int]) -> IntArray:
        """Tokens before the padding of the rows at `places`, `[N]`."""
        found = np.asarray([self.find(place) for place in places]).reshape(-1, 2)
        lengths = np.zeros(len(found), np.int64)
        for number, rows in enumerate(self._rows):
            mine = found[:, 0] == number
            lengths[mine] = rows.lengths(found[mine, 1])
        return lengths

    def _order(self, number: int, count: int, epoch: int) -> IntArray:
        """The order of `count` rows in an epoch of a set, cached for the last epoch asked for."""
        if not self._shuffle:
            epoch = 0
        if number not in self._orders or self._orders[number][0] != epoch:
            self._orders[number] = (epoch, self._draw(number, count, epoch))
        return self._orders[number][1]

    def _draw(self, number: int, count: int, epoch: int) -> IntArray:
        if not self._shuffle:
            return np.arange(count)
        seed = [self._seed, epoch] if self._pattern is None else [self._seed, epoch, number]
        return np.random.default_rng(seed).permutation(count)


def interleave(weights: Sequence[float]) -> npt.NDArray[np.intp]:
    """Which set takes each of `PATTERN` turns, `[PATTERN]`: every run of turns is close to the weights.

    A set gets the number of turns nearest to its share, but at least one.

    Raises:
        ValueError: more sets than turns.
    """
    if len(weights) > PATTERN:
        raise ValueError(f"a weighted mixture may have {PATTERN} token sets, got {len(weights)}")
    share = np.asarray(weights) / np.sum(weights) * PATTERN
    turns = np.maximum(1, np.floor(share)).astype(np.int64)
    while turns.sum() > PATTERN:  # the smallest were given more than their share
        turns[np.argmax(turns)] -= 1
    while turns.sum() < PATTERN:
        turns[np.argmax(share - turns)] += 1
    middle = np.concatenate([(np.arange(n) + 0.5) / n for n in turns])  # turn k of n belongs at (k + 1/2) / n
    owner = np.repeat(np.arange(len(turns)), turns)
    return owner[np.lexsort((owner, middle))]


def as_mixture(tokens: Any) -> TokenMixture:
    """`tokens` itself if it is a mixture, otherwise a mixture of that one set."""
    return tokens if isinstance(tokens, TokenMixture) else TokenMixture([tokens])
