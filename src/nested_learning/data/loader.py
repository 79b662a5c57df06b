"""Batches from a token array: reshuffled every epoch, split over ranks, and resumable to the exact batch.

Shapes: a window is `seq_len + 1` consecutive tokens; a batch is `[B, seq_len + 1]`, int64. Inputs are
`batch[:, :-1]`, targets `batch[:, 1:]`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nested_learning.data.corpus import TokenArray

STATE_VERSION = 2


class TokenLoader:
    """Endless iterator over the windows of `tokens [N]`.

    The array is cut into `N // (seq_len + 1)` windows that do not overlap. Epoch after epoch they are laid
    out in one endless line, every epoch in its own order drawn from `(seed, epoch)`; each step takes the next
    `world_size * batch_size` windows of that line, and rank r takes the r-th group of `batch_size`. So every
    window is used exactly once per epoch over all ranks, with no window left out; the last batch of an epoch
    may reach into the next. `shuffle=False` keeps the order of the array in every epoch.

    Raises ValueError for a size below 1, a rank outside the world, or too few tokens for one global batch.
    """

    def __init__(
        self,
        tokens: TokenArray,
        seq_len: int,
        batch_size: int,
        seed: int,
        shuffle: bool = True,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank={rank} must be at least 0 and below world_size={world_size}")
        self.num_windows = _count_windows(tokens, seq_len, batch_size, world_size)
        self._tokens = tokens
        self._settings = {
            "seq_len": seq_len,
            "global_batch": batch_size * world_size,
            "seed": seed,
            "shuffle": shuffle,
            "num_tokens": len(tokens),
        }
        self._seq_len, self._batch_size, self._seed, self._shuffle = seq_len, batch_size, seed, shuffle
        self._rank, self._world_size = rank, world_size
        self._used = 0  # windows used by all ranks since the start
        self._order: tuple[int, npt.NDArray[np.int64]] = (0, self._draw_order(0))

    @property
    def epoch(self) -> int:
        """How many times all windows have been used."""
        return self._used // self.num_windows

    def __iter__(self) -> TokenLoader:
        return self

    def __next__(self) -> Tensor:
        """The next batch of this rank, `[B, seq_len + 1]`."""
        first = self._used + self._rank * self._batch_size
        windows = [self._window(place) for place in range(first, first + self._batch_size)]
        self._used += self._batch_size * self._world_size
        return _gather(self._tokens, windows, self._seq_len)

    def state_dict(self) -> dict[str, Any]:
        """Position in the line and settings, as plain values: the same on every rank, and for every
        number of ranks that share the same global batch."""
        epoch, position = divmod(self._used, self.num_windows)
        return {"version": STATE_VERSION, "epoch": epoch, "position": position, **self._settings}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken, on as many ranks as there are now.

        Raises ValueError if it was made with other settings, data or `world_size * batch_size`.
        """
        for name, mine in {"version": STATE_VERSION, **self._settings}.items():
            if state.get(name) != mine:
                raise ValueError(
                    f"loader state has {name}={state.get(name)!r}, this loader has {name}={mine!r}; "
                    "they must be equal to resume"
                )
        self._used = state["epoch"] * self.num_windows + state["position"]

    def _window(self, place: int) -> int:
        """Which window stands at `place` of the endless line."""
        epoch, position = divmod(place, self.num_windows)
        if self._order[0] != epoch:
            self._order = (epoch, self._draw_order(epoch))
        return int(self._order[1][position])

    def _draw_order(self, epoch: int) -> npt.NDArray[np.int64]:
        if not self._shuffle:
            return np.arange(self.num_windows)
        return np.random.default_rng([self._seed, epoch]).permutation(self.num_windows)


def sequential_batches(
    tokens: TokenArray, seq_len: int, batch_size: int, max_batches: int | None = None
) -> Iterator[Tensor]:
    """Validation batches `[B, seq_len + 1]`: the same windows in the same order at every call.

    At most `max_batches` full batches (None: as many as the data gives). Their windows are spread evenly over
    the array and taken in its order, so that a capped validation still sees every file of the corpus.
    Raises ValueError for a size below 1 or too few tokens for one batch.
    """
    num_windows = _count_windows(tokens, seq_len, batch_size, world_size=1)
    num_batches = num_windows // batch_size
    if max_batches is not None:
        if max_batches < 1:
            raise ValueError(f"max_batches={max_batches} must be at least 1, or None")
        num_batches = min(num_batches, max_batches)
    count = num_batches * batch_size
    windows = [place * num_windows // count for place in range(count)]
    starts = range(0, count, batch_size)
    return (_gather(tokens, windows[start : start + batch_size], seq_len) for start in starts)


def _count_windows(tokens: TokenArray, seq_len: int, batch_size: int, world_size: int) -> int:
    for name, value in (("seq_len", seq_len), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    num_windows = len(tokens) // (seq_len + 1)
    if num_windows < batch_size * world_size:
        raise ValueError(
            f"{len(tokens)} tokens make {num_windows} windows of seq_len={seq_len} plus 1, fewer than one "
            f"batch of batch_size={batch_size} on world_size={world_size}"
        )
    return num_windows


def _gather(tokens: TokenArray, windows: list[int], seq_len: int) -> Tensor:
    """The given windows as int64 `[len(windows), seq_len + 1]`."""
    width = seq_len + 1
    rows = [tokens[window * width : (window + 1) * width] for window in windows]
    return torch.from_numpy(np.stack(rows).astype(np.int64))
