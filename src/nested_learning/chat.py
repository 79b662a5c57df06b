"""A conversation with a model whose memory lives on: what is read stays in its state until it is forgotten.

`Chat` is the conversation without a terminal; `nl chat` shows it. The state has always read everything that
was said. So the first token of what comes next has no loss here: no prediction of it is kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from nested_learning.adapt import AdaptConfig, diff, memorize, score
from nested_learning.data.tokenizer import Tokenizer
from nested_learning.models.lm import HopeLM
from nested_learning.models.sampling import Sampler
from nested_learning.models.text import Continuation, TextStream
from nested_learning.state import ModelState, load_state

PIECE = 1024
"""Tokens of a text that are read at a time, at least."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Remembered:
    """What came of reading a text.

    Args:
        read, tokens: how many tokens have been read, and how many there are.
        first: mean loss of what was read, nats per token; NaN before anything was scored.
        again: the same in a second reading, by the memory that has read the text; None until all is read.
    """

    read: int
    tokens: int
    first: float
    again: float | None = None


class Chat:
    """A conversation.

    Args:
        model: in evaluation mode.
        tokenizer: of the model.
        sampler: how answers are drawn; each answer has a seed of its own, counted up from the sampler's.
        stop: strings that end an answer.
        learn: also learn from the loss of what is read (`nested_learning.adapt`); None = only what layers
            write by themselves.
    """

    def __init__(
        self,
        model: HopeLM,
        tokenizer: Tokenizer,
        sampler: Sampler,
        stop: Sequence[str] = (),
        learn: AdaptConfig | None = None,
    ) -> None:
        self.model, self.tokenizer, self.sampler = model, tokenizer, sampler
        self.stop, self.learn = stop, learn
        self.device = model.embedding.weight.device
        self.answers = 0
        self.fresh = self.state = self._begin()

    def forget(self) -> None:
        """Begin again with a fresh memory."""
        self.state = self.fresh

    def say(self, text: str) -> Iterator[str]:
        """Read `text` and continue it, piece by piece. Both become part of the memory.

        An answer that is not heard to its end becomes part of it as far as it came.

        Raises:
            ValueError: an empty text.
        """
        tokens = rest = self._encode(text)
        if self.learn is not None and len(tokens) > 1:
            self._read(tokens[:-1])
            rest = tokens[-1:]
        how = self._next_sampler()
        answer = Continuation(self.tokenizer, tokens, self.stop, how.max_new_tokens)
        stream = TextStream(self.model.rows_of([rest], how, state=self.state), answer)
        try:
            yield from stream
        finally:
            self.state = stream.stop()

    def remember(self, text: str) -> Iterator[Remembered]:
        """Read `text` into the memory; yields how far it is, and at last what a second reading gives.

        Raises:
            ValueError: an empty text.
        """
        tokens = self._encode(text)
        total, scored, before, read = 0.0, 0, self.state, 0
        while read < len(tokens):
            part = tokens[max(read - 1, 0) : read + PIECE]
            losses, state = self._score(part, before)
            total, scored = total + float(losses.sum()), scored + losses.numel()
            read, before = min(read + PIECE, len(tokens)), state
            yield Remembered(read=read, tokens=len(tokens), first=total / scored if scored else math.nan)
        self.state = self._step(tokens[-1:], before)
        again = self._losses(tokens, self.state) if scored else torch.full((1,), math.nan)
        first = total / scored if scored else math.nan
        yield Remembered(read=read, tokens=len(tokens), first=first, again=float(again.mean()))

    def surprise(self, text: str) -> list[tuple[str, float]]:
        """Every token of `text` but the first with its loss in nats, given the memory, which stays as it is.

        Raises:
            ValueError: a text of less than two tokens.
        """
        tokens = self._encode(text)
        if len(tokens) < 2:
            raise ValueError(f"{text!r} is one token; a surprise needs a token before it")
        losses = self._losses(tokens, self.state).tolist()
        words = [self.tokenizer.decode([token]) for token in tokens[1:]]
        return list(zip(words, losses, strict=True))

    def moved(self, path: str | Path | None = None) -> dict[str, dict[str, float]]:
        """How far the memory is from a fresh one, or from a saved one: ‖b − a‖ / ‖a‖ by kind and layer.

        Linear memories start empty: their distance from there is infinite.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file holds no state, or that of another model.
        """
        other = self.fresh if path is None else load_state(path, self.device)
        found = diff(self.model, other, self.state)
        return {kind: {layer: float(far[0]) for layer, far in of.items()} for kind, of in found.items()}

    def save(self, path: str | Path) -> None:
        """Write the memory to a file. Raises FileNotFoundError without its folder."""
        self.state.save(path)

    def load(self, path: str | Path) -> None:
        """Take the memory from a file; nothing changes if it does not fit.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file holds no state, or that of another model or batch.
        """
        state = load_state(path, self.device)
        self._step([self.tokenizer.eos_id], state)  # a state that does not fit is refused here
        self.state = state

    def _begin(self) -> ModelState:
        plain = self.learn is not None and self.learn.paths in ("cms", "all") and self.learn.lr > 0
        return self.model.init_state(1, plain=plain).detach()

    def _encode(self, text: str) -> list[int]:
        tokens = self.tokenizer.encode(text)
        if not tokens:
            raise ValueError("there is no text to read")
        return tokens

    def _next_sampler(self) -> Sampler:
        seed = self.sampler.seed
        self.answers += 1
        return replace(self.sampler, seed=None if seed is None else seed + self.answers - 1)

    def _tensor(self, tokens: Sequence[int]) -> Tensor:
        return torch.tensor([tokens], device=self.device)

    @torch.no_grad()
    def _step(self, tokens: Sequence[int], state: ModelState) -> ModelState:
        after: ModelState = self.model(self._tensor(tokens), state)[1]
        return after

    def _score(self, tokens: Sequence[int], state: ModelState) -> tuple[Tensor, ModelState]:
        """Losses `[T]` of all tokens but the first, and the state that has read all but the last."""
        if len(tokens) < 2:
            return torch.zeros(0), state
        if self.learn is None:
            losses, after = score(self.model, self._tensor(tokens), state)
        else:
            report, after = memorize(self.model, self._tensor(tokens), state, self.learn)
            losses = report.losses
        return losses[0], after

    def _losses(self, tokens: Sequence[int], state: ModelState) -> Tensor:
        """Losses `[T]` of all tokens but the first, learning nothing."""
        parts = []
        for start in range(0, len(tokens) - 1, PIECE):
            losses, state = score(self.model, self._tensor(tokens[start : start + PIECE + 1]), state)
            parts.append(losses[0])
        return torch.cat(parts)

    def _read(self, tokens: Sequence[int]) -> None:
        _, before = self._score(tokens, self.state)
        self.state = self._step(tokens[-1:], before)
