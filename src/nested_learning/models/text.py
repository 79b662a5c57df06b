"""Texts in, texts out: what `Rows` draws as text, piece by piece, up to a stop string or its end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

from nested_learning.data.tokenizer import Tokenizer
from nested_learning.models.generation import Rows
from nested_learning.state import ModelState

UNFINISHED = "\ufffd"
"""What the bytes of a character decode to while some of them are missing."""
End = Literal["length", "eos", "stop"]


class Detokenizer:
    """Text of tokens as they come. A character of several tokens comes whole; the pieces add up to
    `decode(before + tokens)` without `decode(before)`.

    Args:
        before: tokens of the text so far. SentencePiece drops a space at the start of a text only.
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int]) -> None:
        self.tokenizer = tokenizer
        self.tokens, self.shown = list(before), len(before)
        self.anchor = 0  # what is before it no longer changes what is after it

    def add(self, token: int) -> str:
        """What a token adds to the text that is whole; empty while a character is not."""
        self.tokens.append(token)
        text = self._new()
        return "" if text.endswith(UNFINISHED) else self._show(text)

    def rest(self) -> str:
        """What was held back, with U+FFFD for characters that stayed unfinished."""
        return self._show(self._new())

    def _new(self) -> str:
        known = self.tokenizer.decode(self.tokens[self.anchor : self.shown])
        return self.tokenizer.decode(self.tokens[self.anchor :])[len(known) :]

    def _show(self, text: str) -> str:
        if text:
            self.anchor, self.shown = self.shown, len(self.tokens)
        return text


class StopStrings:
    """Cuts a text that comes in pieces before the first of some strings, wherever the pieces are cut.

    Raises:
        ValueError: an empty string, which every text holds.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if isinstance(stops, str) or not all(isinstance(stop, str) and stop for stop in stops):
            raise ValueError(f"stop must be a list of strings that are not empty, got {stops!r}")
        self.stops, self.held, self.found = stops, "", False

    def add(self, piece: str) -> str:
        """The text that is sure to stay, now that `piece` has come; `found` says that a string is there."""
        if self.found:
            return ""
        self.held += piece
        places = [place for stop in self.stops if (place := self.held.find(stop)) >= 0]
        self.found = bool(places)
        keep = min(places) if places else len(self.held) - self._beginning()
        sure, self.held = self.held[:keep], "" if self.found else self.held[keep:]
        return sure

    def rest(self) -> str:
        """What was held back because it might have become a stop string."""
        sure, self.held = self.held, ""
        return sure

    def _beginning(self) -> int:
        """How many characters at the end may be the beginning of a stop string."""
        longest = max((len(stop) - 1 for stop in self.stops), default=0)
        for size in range(min(longest, len(self.held)), 0, -1):
            if any(stop.startswith(self.held[-size:]) for stop in self.stops):
                return size
        return 0


class Continuation:
    """The text of one row while its tokens come.

    `text` is what has come of it, and `end` why it ended: "eos", "stop" or "length", None before.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stops: Sequence[str], most: int) -> None:
        self.eos, self.left = tokenizer.eos_id, most
        self.words, self.stops = Detokenizer(tokenizer, prompt), StopStrings(stops)
        self.text = ""
        self.end: End | None = None if most else "length"

    def add(self, token: int) -> str:
        """What a token adds to the text."""
        self.left -= 1
        if token == self.eos:
            self.end = "eos"
            piece = self.stops.add(self.words.rest())
        else:
            piece = self.stops.add(self.words.add(token))
            if not self.stops.found and not self.left:
                self.end = "length"
                piece += self.stops.add(self.words.rest())
        if self.stops.found:
            self.end = "stop"
        elif self.end:
            piece += self.stops.rest()
        self.text += piece
        return piece


def text_list(prompts: Sequence[str]) -> Sequence[str]:
    """`prompts`, which must be several strings, and not one. Raises TypeError."""
    if isinstance(prompts, str):
        raise TypeError("prompts must be a list of strings, got one string")
    return prompts


def prompt_tokens(tokenizer: Tokenizer, prompt: str, first: bool) -> list[int]:
    """The tokens of a prompt; an empty one at the start of a context is the end of a text before it.

    Raises:
        TypeError: no string.
        ValueError: an empty prompt that goes on from a state, so that there is nothing to go on from.
    """
    if not isinstance(prompt, str):
        raise TypeError(f"a prompt must be a string, got {type(prompt).__name__}")
    tokens = tokenizer.encode(prompt)
    if not tokens and not first:
        raise ValueError("a prompt that goes on from a state must not be empty")
    return tokens or [tokenizer.eos_id]


def continue_texts(rows: Rows, texts: Sequence[Continuation]) -> None:
    """Draw the rows of a batch to their ends; `texts` has the continuation of each."""
    for draw in rows.draws():
        for row, token in zip(draw.rows, draw.tokens.tolist(), strict=True):
            texts[row].add(token)
            if texts[row].end:
                rows.stop(row)


class TextStream(Iterator[str]):
    """A continuation in pieces, as an iterator. See `HopeLM.stream`.

    Once it has ended, `end` says why ("eos", "stop" or "length"), `tokens` are prompt and continuation, with
    the tokens of a stop string, and `state()` has read all of them.
    """

    def __init__(self, rows: Rows, text: Continuation) -> None:
        self._rows, self._text = rows, text
        self._pieces = self._run()

    def __next__(self) -> str:
        return next(self._pieces)

    @property
    def text(self) -> str:
        """What has come so far."""
        return self._text.text

    @property
    def end(self) -> End | None:
        """Why it ended; None before."""
        return self._text.end

    @property
    def tokens(self) -> list[int]:
        """Prompt and continuation. Whole once the stream has ended."""
        return self._rows.text(0)

    def state(self) -> ModelState:
        """The state after all of `tokens`, from which another text can go on; ends the stream first."""
        for _ in self:
            pass
        return self._rows.finish()

    def stop(self) -> ModelState:
        """End the text where it is; the state after that."""
        self._rows.stop(0)
        return self.state()

    def _run(self) -> Iterator[str]:
        for draw in self._rows.draws():
            piece = self._text.add(int(draw.tokens[0]))
            if self._text.end:
                self._rows.stop(0)
            if piece:
                yield piece
