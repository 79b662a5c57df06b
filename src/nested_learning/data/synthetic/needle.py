"""A needle in a haystack with one token per word: RULER's single-key and multi-key tasks for small models.

After Hsieh et al., "RULER" (arXiv 2404.06654): a repetitive text, sentences that assign a number to a key,
and at the end the question for one of the numbers. The model answers by continuing the text.
"""

from __future__ import annotations

import random
from itertools import chain

import torch
from torch import Tensor

from nested_learning.data.padding import IGNORE

NOISE = (
    "The grass is green .",
    "The sky is blue .",
    "The sun is yellow .",
    "Here we go .",
    "There and back again .",
)
NEEDLE = "One of the special magic numbers for {key} is : {value} ."
QUESTION = "What is the special magic number for {key} ? The special magic number for {key} is :"
KEYS = (
    *("anchor", "barrel", "candle", "donkey", "engine", "feather", "garden", "hammer"),
    *("island", "jacket", "kettle", "ladder", "magnet", "needle", "orange", "pencil"),
    *("quartz", "ribbon", "saddle", "tunnel", "umbrella", "violin", "window", "yogurt"),
    *("blanket", "compass", "dolphin", "falcon", "glacier", "harbor", "lantern", "mirror"),
)
DIGITS = tuple("0123456789")
ANSWER = 3
"""Digits of a number, one token each: a guess is right once in 1000 times."""


def _words(sentence: str) -> list[str]:
    return [word for word in sentence.split() if not word.startswith("{")]


WORDS = tuple(dict.fromkeys(chain(*map(_words, (*NOISE, NEEDLE, QUESTION)), KEYS, DIGITS)))
"""The vocabulary: token i is `WORDS[i]`."""
_IDS = {word: token for token, word in enumerate(WORDS)}
_NOISE = [[_IDS[word] for word in sentence.split()] for sentence in NOISE]


def encode_words(text: str) -> list[int]:
    """Tokens of words separated by spaces.

    Raises:
        KeyError: a word is not in `WORDS`.
    """
    return [_IDS[word] for word in text.split()]


def decode_words(tokens: list[int]) -> str:
    """Inverse of `encode_words`."""
    return " ".join(WORDS[token] for token in tokens)


def needle_sample(
    length: int, rng: random.Random, depth: float | None = None, needles: int = 1
) -> tuple[list[int], list[int]]:
    """A prompt and its answer of `ANSWER` tokens, together `length` tokens.

    The haystack ends with a whole sentence, and needles are inserted between sentences.

    Args:
        length: tokens of prompt and answer.
        rng: draws keys, numbers and places.
        depth: position of the needle that is asked for, from 0 (at the start) to 1 (right before the
            question), moved to the nearest end of a sentence. None = a random end of a sentence.
        needles: number of sentences with a number, of different keys; all but one are distractors at random
            places.

    Raises:
        ValueError: a length without room for the needles, a depth outside of [0, 1], or too many needles.
    """
    if depth is not None and not 0 <= depth <= 1:
        raise ValueError(f"depth must be in [0, 1] or None, got {depth}")
    if not 1 <= needles <= len(KEYS):
        raise ValueError(f"needles must be from 1 to {len(KEYS)}, got {needles}")
    keys = rng.sample(KEYS, needles)
    values = ["".join(rng.choices(DIGITS, k=ANSWER)) for _ in keys]
    pairs = zip(keys, values, strict=True)
    facts = [encode_words(NEEDLE.format(key=key, value=" ".join(value))) for key, value in pairs]
    question = encode_words(QUESTION.format(key=keys[0]))
    room = length - len(question) - ANSWER - sum(map(len, facts))
    if room < needles * max(map(len, _NOISE)):
        least = length - room + needles * max(map(len, _NOISE))
        raise ValueError(f"length must be at least {least} for {needles} needles, got {length}")
    hay = _haystack(room, rng)
    context = _insert(hay, facts, depth, rng)
    return context + question, encode_words(" ".join(values[0]))


def _haystack(size: int, rng: random.Random) -> list[list[int]]:
    """Sentences of the repeated noise up to a random one; the first is cut to make `size` tokens."""
    last, sentences = rng.randrange(len(_NOISE)), list[list[int]]()
    while size > 0:
        sentences.append(_NOISE[last][-size:])
        size -= len(sentences[-1])
        last = (last - 1) % len(_NOISE)
    return sentences[::-1]


def _insert(
    hay: list[list[int]], facts: list[list[int]], depth: float | None, rng: random.Random
) -> list[int]:
    """The haystack as one list with the first fact at `depth` and the others at random places."""
    ends = [sum(map(len, hay[:i])) for i in range(len(hay) + 1)]
    if depth is None:
        place = rng.randrange(len(ends))
    else:
        place = min(range(len(ends)), key=lambda i: abs(ends[i] - depth * ends[-1]))
    others = rng.sample([i for i in range(len(ends)) if i != place], len(facts) - 1)
    at = dict(zip([place, *others], facts, strict=True))
    return [token for i, sentence in enumerate([*hay, []]) for token in (*at.get(i, ()), *sentence)]


def needle_batch(batch_size: int, length: int, rng: random.Random, needles: int = 1) -> tuple[Tensor, Tensor]:
    """`batch_size` training samples with needles at random depths.

    Returns:
        `tokens [B, length - 1]` and `targets` of the same shape, int64: the next token at positions of the
        answer, otherwise -100.
    """
    samples = [needle_sample(length, rng, None, needles) for _ in range(batch_size)]
    rows = torch.tensor([prompt + answer for prompt, answer in samples])
    targets = torch.full_like(rows[:, 1:], IGNORE)
    targets[:, -ANSWER:] = rows[:, -ANSWER:]
    return rows[:, :-1], targets
