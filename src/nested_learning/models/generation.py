"""Going on with texts: rows of any length in one batch, one token at a time on a carried state.

All rows of a batch stand at the same place. Where a row's prompt goes on, its next token is that of the
prompt; where it has ended, the token is drawn. So every row is read as if alone, whatever a layer does at a
place (writes, resets, rotary positions), and nothing is padded. While no row draws, prompts are read in parts
of many tokens, and rows that have ended are dropped first.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from nested_learning.models.sampling import Sampler
from nested_learning.state import ModelState

PREFILL = 2048
"""Tokens of a prompt that are read at a time."""


class Reader(Protocol):
    """Reads one token more of every row."""

    def __call__(self, token: Tensor) -> Tensor:
        """The logits `[B, 1, V]` after `token [B, 1]`; the next call may write into the same tensor."""
        ...

    def now(self) -> ModelState:
        """The state after all tokens so far."""
        ...


class Writer(Protocol):
    """What a model must offer to be continued."""

    def __call__(self, tokens: Tensor, state: ModelState | None) -> tuple[Tensor, ModelState]:
        """`tokens [B, T]` → logits `[B, T, V]` and the state after them."""
        ...

    def reader(self, state: ModelState, example: Tensor) -> Reader:
        """A reader that goes on from `state`; `example [B, 1]`: a token."""
        ...


class EagerReader:
    """A reader that calls the model."""

    def __init__(self, model: Callable[..., tuple[Tensor, ModelState]], state: ModelState) -> None:
        self.model, self.state = model, state

    def __call__(self, token: Tensor) -> Tensor:
        """See `Reader`."""
        logits, self.state = self.model(token, self.state)
        return logits

    def now(self) -> ModelState:
        """See `Reader`."""
        return self.state


class Draw(NamedTuple):
    """One token more of some rows: `rows`, numbers of rows, and their `tokens [n]` on the device."""

    rows: list[int]
    tokens: Tensor


@dataclass
class Rows:
    """A batch of texts that is being continued.

    Args:
        model: see `Writer`.
        tokens: `[B, longest prompt + max_new_tokens]` int64: prompts on the left, what is drawn after them.
        lengths: tokens of each prompt, at least 1.
        sampler: how tokens are drawn.
        state: what was read before; None = start of a context.
        part: tokens of a prompt that are read at a time.
    """

    model: Writer
    tokens: Tensor
    lengths: list[int]
    sampler: Sampler
    state: ModelState | None = None
    part: int = PREFILL

    def __post_init__(self) -> None:
        self.ends = [length + self.sampler.max_new_tokens for length in self.lengths]
        self.generators = self.sampler.generators(len(self.lengths), self.tokens.device)
        self.read = self.place = 0  # places that the state has seen, and the one that is drawn

    def stop(self, row: int) -> None:
        """End a row after the token that was drawn last, or after its prompt."""
        self.ends[row] = min(self.ends[row], max(self.place + 1, self.lengths[row]))

    def text(self, row: int) -> list[int]:
        """Prompt and continuation of a row, as far as they are."""
        tokens: list[int] = self.tokens[row, : self.ends[row]].tolist()
        return tokens

    @torch.no_grad()
    def draws(self) -> Iterator[Draw]:
        """Draw token after token; between two of them, `stop` may end rows."""
        rows = [row for row in range(len(self.lengths)) if self.ends[row] > self.lengths[row]]
        if self.state is not None and len(rows) < len(self.lengths):
            self.state = self.state.rows(torch.tensor(rows))
        while rows:
            logits = self._read_to(min(self.lengths[row] for row in rows), rows)
            assert self.state is not None
            reader, self.state = self.model.reader(self.state, self._columns(rows, 0, 1)), None
            self.place = self.read
            while drawing := self._drawing(rows):
                yield self._draw(logits, rows, drawing)
                self.place += 1
                if not self._drawing(rows):
                    break
                logits = reader(self._columns(rows, self.read, self.place))
                self.read = self.place
            left = [n for n, row in enumerate(rows) if self.lengths[row] > self.place]
            self.state = reader.now()
            del reader  # its memory
            if left and len(left) < len(rows):
                self.state = self.state.rows(torch.tensor(left))
            rows = [rows[n] for n in left]

    @torch.no_grad()
    def finish(self) -> ModelState:
        """The state after all tokens, the last one included, once `draws` has ended.

        Raises:
            ValueError: rows that began or ended in different places, which have no state in common.
        """
        for places in (self.lengths, self.ends):
            if len({*places}) > 1:
                raise ValueError(f"rows of {sorted({*places})} tokens have no state in common")
        rows = list(range(len(self.lengths)))
        if self.ends[0] > self.read:
            self._read_to(self.ends[0], rows)
        assert self.state is not None
        return self.state

    def _drawing(self, rows: Sequence[int]) -> list[int]:
        """Which of `rows` draw a token at the place, by their number in the batch."""
        return [n for n, row in enumerate(rows) if self.lengths[row] <= self.place < self.ends[row]]

    def _columns(self, rows: list[int], start: int, end: int) -> Tensor:
        """The tokens of rows at some places."""
        some = self.tokens[:, start:end]
        return some if len(rows) == len(self.lengths) else some[rows]

    def _read_to(self, end: int, rows: list[int]) -> Tensor:
        """Read places up to `end` in parts; the logits `[B, 1, V]` after the last of them."""
        logits = torch.empty(0)
        for part in torch.split(self._columns(rows, self.read, end), self.part, 1):
            logits, self.state = self.model(part, self.state)
        self.read = end
        return logits[:, -1:]

    def _draw(self, logits: Tensor, rows: list[int], drawing: list[int]) -> Draw:
        """Draw a token for some rows of the batch, and write it down."""
        last = logits[:, -1] if len(drawing) == len(rows) else logits[drawing, -1]
        chosen = [rows[n] for n in drawing]
        new = self.sampler.draw(last, [self.generators[row] for row in chosen])
        if len(chosen) == len(self.lengths):
            self.tokens[:, self.place] = new
        else:
            self.tokens[chosen, self.place] = new
        return Draw(chosen, new)
