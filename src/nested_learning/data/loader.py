"""Batches of tokens: shuffled every epoch, split over ranks and workers, resumable to the exact batch.

A row is `seq_len + 1` token ids; a batch is `[B, seq_len + 1]`, int64. `split_batch(batch)` gives the inputs
and targets of a model.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from nested_learning.data.config import LoaderConfig
from nested_learning.data.mixture import RowSequence, as_mixture
from nested_learning.data.padding import IGNORE
from nested_learning.data.shards import TokenArray, Tokens

STATE_VERSION = 4
BUCKET_BATCHES = 64
"""With bucketing, rows are sorted by length within groups of this many global batches."""
TRIM = 32
"""Batches are trimmed to a multiple of this many tokens, so that few shapes occur."""


class TokenLoader:
    """Endless iterator over batches of the rows of `tokens`.

    The rows form an endless sequence (`data.mixture.RowSequence`). Each step takes its next
    `world_size * batch_size` rows, and rank r takes the r-th group of `batch_size`. So every row is used
    exactly once per epoch over all ranks; the last batch of an epoch may contain rows of the next. With
    `options.bucketing` the rows of `BUCKET_BATCHES` steps are reordered, so an epoch is complete only at the
    end of such a group.

    Args:
        tokens: one set, or a `TokenMixture`.
        seq_len: inputs of a row.
        batch_size: rows of a rank and step.
        seed, shuffle: of the order of the rows, drawn anew every epoch; without shuffling it stays the same.
        rank, world_size: this process and the number of processes.
        options: crossing, bucketing, packing, workers and curriculum.
        block: with `options.packing`, documents begin at multiples of this many tokens, which is
            `HopeConfig.alignment`.
        pin_memory: for CUDA: batches are in pinned memory, from which a copy need not wait, and the next one
            is read in a thread while the device computes. They are the same batches in the same order.

    Raises:
        ValueError: a size below 1, a rank that is not below `world_size`, too few tokens for one global
            batch, or a stage of the curriculum whose length does not divide `seq_len` or, with packing, is
            not a multiple of `block`.
    """

    def __init__(
        self,
        tokens: TokenArray | Tokens,
        seq_len: int,
        batch_size: int,
        seed: int,
        shuffle: bool = True,
        rank: int = 0,
        world_size: int = 1,
        options: LoaderConfig | None = None,
        block: int = 1,
        pin_memory: bool = False,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank={rank} must be at least 0 and below world_size={world_size}")
        options = options or LoaderConfig()
        _check_sizes(seq_len, batch_size)
        _check_curriculum(options, seq_len, block)
        mixture = as_mixture(tokens)
        packing = block if options.packing else None
        self._rows = RowSequence(mixture, seq_len, options.crossing, seed, shuffle, packing)
        self.num_windows = len(self._rows)
        self._global = batch_size * world_size
        if self.num_windows < self._global:
            raise ValueError(
                f"{len(tokens)} tokens make {self.num_windows} windows of seq_len={seq_len} plus 1, fewer "
                f"than one batch of batch_size={batch_size} on world_size={world_size}"
            )
        self._settings = {
            "seq_len": seq_len,
            "global_batch": self._global,
            "seed": seed,
            "shuffle": shuffle,
            "num_tokens": len(tokens),
            "windows": self._rows.counts,
            "weights": mixture.weights,
            "crossing": options.crossing,
            "bucketing": options.bucketing,
            "packing": packing,
            "curriculum": [[stage.until_step, stage.seq_len] for stage in options.curriculum],
        }
        self._seq_len, self._batch_size, self._seed, self._options = seq_len, batch_size, seed, options
        self._rank, self._pin = rank, pin_memory
        self._step = 0
        self._group: tuple[int, list[int]] = (-1, [])
        self._reader: Iterator[Tensor] | None = None

    @property
    def epoch(self) -> int:
        """Number of complete epochs."""
        return self._step * self._global // self.num_windows

    def __iter__(self) -> TokenLoader:
        return self

    def __next__(self) -> Tensor:
        """The next batch of this rank, `[B, seq_len + 1]` (other shapes with bucketing or a curriculum)."""
        ahead = self._options.workers or self._pin
        batch = self._next_read_ahead() if ahead else self.batch(self._step)
        self._step += 1
        return batch

    def _next_read_ahead(self) -> Tensor:
        """The batch of this step, which workers or a thread have read meanwhile."""
        if self._reader is None:
            self._reader = iter(_read_ahead(self, self._step)) if self._options.workers else self._pinned()
        try:
            return next(self._reader)
        except BaseException:
            self._reader = None  # it has ended; the same batch is tried again, should anyone ask
            raise

    def _pinned(self) -> Iterator[Tensor]:
        """Batches in pinned memory from here on; the one after each is read in a thread meanwhile.

        One batch is read at a time. An error is raised at the batch that cannot be read. What was read ahead
        is no part of the state: a loader that is resumed reads it again.
        """

        def read(step: int) -> Tensor:
            return self.batch(step).pin_memory()

        with ThreadPoolExecutor(1, "batches") as thread:
            step, coming = self._step, thread.submit(read, self._step)
            while True:
                batch, step = coming.result(), step + 1
                coming = thread.submit(read, step)
                yield batch

    def batch(self, step: int) -> Tensor:
        """The batch of this rank at any step, counted from 0."""
        first = step * self._global
        places = self._bucketed(step) if self._options.bucketing else range(first, first + self._global)
        mine = places[self._rank * self._batch_size : (self._rank + 1) * self._batch_size]
        batch = torch.from_numpy(np.stack([self._rows[place] for place in mine]))
        if self._options.bucketing:  # by the rows of all ranks, so that all have the same shape
            longest = int(self._rows.lengths(places).max()) - 1
            return batch[:, : min(self._seq_len, -(-longest // TRIM) * TRIM) + 1]
        for stage in self._options.curriculum:
            if step < stage.until_step:
                return cut_rows(batch, stage.seq_len)
        return batch

    def state_dict(self) -> dict[str, Any]:
        """The position and the settings as plain values.

        They are the same on every rank, and for every number of ranks with the same global batch.
        """
        return {"version": STATE_VERSION, "used": self._step * self._global, **self._settings}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume at the position of `state`, which may come from another number of ranks and workers.

        Raises:
            ValueError: it was made with other settings, data or `world_size * batch_size`.
        """
        for name, mine in {"version": STATE_VERSION, **self._settings}.items():
            if state.get(name) != mine:
                raise ValueError(
                    f"loader state has {name}={state.get(name)!r}, this loader has {name}={mine!r}; "
                    "they must be equal to resume"
                )
        self._step = state["used"] // self._global
        self._reader = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_reader": None}  # for workers that are not forked

    def _bucketed(self, step: int) -> list[int]:
        """The rows of the global batch of `step`: similar lengths together, batches in random order."""
        number, offset = divmod(step, BUCKET_BATCHES)
        if self._group[0] != number:
            size = BUCKET_BATCHES * self._global
            places = np.arange(number * size, (number + 1) * size)
            by_length = places[np.argsort(self._rows.lengths(places.tolist()), kind="stable")]
            batches = by_length.reshape(BUCKET_BATCHES, self._global)
            shuffled = np.random.default_rng([self._seed, number, 1]).permutation(batches)
            self._group = (number, shuffled.ravel().tolist())
        return self._group[1][offset * self._global : (offset + 1) * self._global]


class WorkerBatches(IterableDataset[Tensor]):
    """The batches of a loader from a step on, for a `DataLoader(..., batch_size=None)`.

    Worker w of n makes the steps w, w + n, …; a DataLoader reads the workers in turn, so the order is that of
    the loader for any number of workers.

    Args:
        loader: makes the batches.
        first_step: of the loader.
        num_steps: how many steps in all; None = endless.
    """

    def __init__(self, loader: TokenLoader, first_step: int = 0, num_steps: int | None = None) -> None:
        self._loader, self._first, self._count = loader, first_step, num_steps

    def __iter__(self) -> Iterator[Tensor]:
        info = get_worker_info()
        step, stride = (info.id, info.num_workers) if info is not None else (0, 1)
        while self._count is None or step < self._count:
            yield self._loader.batch(self._first + step)
            step += stride


def split_batch(batch: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs and targets `[B, T]` of a batch `[B, T + 1]`; padding is 0 in the inputs, `IGNORE` in targets.

    Padding comes after a document, so no causal model reads it before the document's last target. The first
    token of a document is not a target.
    """
    inputs, targets = batch[:, :-1], batch[:, 1:]
    return inputs.clamp(min=0), torch.where(inputs == IGNORE, IGNORE, targets)


def cut_rows(batch: Tensor, seq_len: int) -> Tensor:
    """Cut rows `[B, T + 1]` into shorter ones, `[B * T / seq_len, seq_len + 1]`, with the same targets."""
    return batch.unfold(1, seq_len + 1, seq_len).reshape(-1, seq_len + 1)


def sequential_batches(
    tokens: TokenArray | Tokens, seq_len: int, batch_size: int, max_batches: int | None = None
) -> Iterator[Tensor]:
    """Validation batches `[B, seq_len + 1]`: the same windows in the same order at every call.

    The windows are spread evenly over the array and taken in its order, so that a limited validation still
    reads from every file of the corpus.

    Args:
        tokens: of the validation part.
        seq_len: inputs of a window.
        batch_size: windows of a batch; all batches are full.
        max_batches: at most; None = all.

    Raises:
        ValueError: a size below 1, or too few tokens for one batch.
    """
    _check_sizes(seq_len, batch_size)
    width = seq_len + 1
    num_windows = len(tokens) // width
    if num_windows < batch_size:
        raise ValueError(
            f"{len(tokens)} tokens make {num_windows} windows of seq_len={seq_len} plus 1, fewer than one "
            f"batch of batch_size={batch_size}"
        )
    num_batches = num_windows // batch_size
    if max_batches is not None:
        if max_batches < 1:
            raise ValueError(f"max_batches={max_batches} must be at least 1, or None")
        num_batches = min(num_batches, max_batches)
    count = num_batches * batch_size
    starts = [place * num_windows // count * width for place in range(count)]
    rows = (tokens[start : start + width].astype(np.int64) for start in starts)
    return (torch.from_numpy(np.stack([next(rows) for _ in range(batch_size)])) for _ in range(num_batches))


def _read_ahead(loader: TokenLoader, first_step: int) -> DataLoader[Tensor]:
    return DataLoader(
        WorkerBatches(loader, first_step),
        batch_size=None,
        num_workers=loader._options.workers,
        pin_memory=loader._pin,
    )


def _check_sizes(seq_len: int, batch_size: int) -> None:
    for name, value in (("seq_len", seq_len), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")


def _check_curriculum(options: LoaderConfig, seq_len: int, block: int) -> None:
    for stage in options.curriculum:
        if stage.seq_len < 1 or seq_len % stage.seq_len:
            raise ValueError(
                f"loader.curriculum: the seq_len of a stage must divide {seq_len}, got {stage.seq_len}"
            )
        if options.packing and stage.seq_len % block:
            raise ValueError(
                f"loader.curriculum: with packing the seq_len of a stage must be a multiple of {block}, "
                f"got {stage.seq_len}"
            )
