"""The text of every token, so that a page can show them one beside the other."""

from __future__ import annotations

from collections.abc import Sequence

from nested_learning.data.tokenizer import Tokenizer

LOST = "\ufffd"  # what bytes decode to that are no character
INSIDE = "·"  # a token in the middle of a character
END = "⟨end⟩"


def token_texts(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """What each of `ids` stands for in the text.

    A character of several tokens stands at the first of them, the others are "·". The end of a document is
    "⟨end⟩".
    """
    texts: list[str] = []
    place = 0
    while place < len(ids):
        if ids[place] == tokenizer.eos_id:
            texts.append(END)
            place += 1
            continue
        size = _whole(tokenizer, ids, place)
        texts += [_after(tokenizer, ids, place, size), *[INSIDE] * (size - 1)]
        place += size
    return texts


def _whole(tokenizer: Tokenizer, ids: Sequence[int], place: int) -> int:
    """How many tokens from `place` on make whole characters: at most 4, or 1 if they never do."""
    if ids[place] not in tokenizer.byte_ids:
        return 1
    for size in (1, 2, 3, 4):
        if LOST not in tokenizer.decode(list(ids[place : place + size])):
            return size
    return 1


def _after(tokenizer: Tokenizer, ids: Sequence[int], place: int, size: int) -> str:
    """The text of some tokens in their place: some tokenizers drop a space where decoding begins."""
    run = list(ids[place : place + size])
    before = list(ids[place - 1 : place]) if place else []
    if not before or before[0] == tokenizer.eos_id or before[0] in tokenizer.byte_ids:
        return tokenizer.decode(run)
    return tokenizer.decode(before + run)[len(tokenizer.decode(before)) :]
