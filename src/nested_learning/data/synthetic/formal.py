"""Six formal languages, judged after every token (after Bhattamishra et al. 2020, and Irie et al. 2023).

Regular ones are judged by whether the prefix is in the language; counter languages and Shuffle-2 by which
tokens may follow, with one class for each set that occurs. Class 0 is "no" or the set at the start.

| language | tokens | class after a prefix |
|---|---|---|
| parity | 0 1 | 1 iff the number of ones is even |
| (aa)* | a | 1 iff the length is even |
| (abab)* | a b | 1 iff the length is a multiple of 4 |
| aⁿbⁿ | a b | what may follow: {a, b}, {b}, the end |
| aⁿbⁿcⁿ | a b c | {a, b}, {b}, {c}, the end |
| Shuffle-2 | ( ) [ ] | 1 if a `)` may follow, plus 2 if a `]` may |

A string of a length is drawn uniformly from those of the language, in Shuffle-2 from those with a number of
round pairs that is drawn before (binomial).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nested_learning.data.padding import IGNORE

Sample = tuple[list[int], list[int]]
"""Tokens of a string, and the class after each of them."""
FEW = 12
"""Up to this length there are so few strings that training has to see those that are held out."""


@dataclass(frozen=True)
class Language:
    """A formal language.

    Args:
        alphabet: its tokens, by number.
        classes: how many classes there are.
        step: lengths of its strings are the multiples of `step`.
        draw: a string of a length, uniformly.
        judge: the class after every token of a string.
        many: whether there are so many strings that held-out ones can be kept out of the training.
    """

    alphabet: str
    classes: int
    step: int
    draw: Callable[[int, random.Random], list[int]]
    judge: Callable[[Sequence[int]], list[int]]
    many: bool = False

    @property
    def vocabulary(self) -> int:
        """Numbers that a model needs as tokens and as classes."""
        return max(len(self.alphabet), self.classes)

    def sample(self, low: int, high: int, rng: random.Random) -> Sample:
        """A string with a length drawn uniformly from those between `low` and `high`.

        Raises:
            ValueError: no string has such a length.
        """
        first, last = max(1, -(-low // self.step)), high // self.step
        if first > last:
            raise ValueError(f"lengths must hold a multiple of {self.step}, got {low} to {high}")
        tokens = self.draw(self.step * rng.randint(first, last), rng)
        return tokens, self.judge(tokens)


def _draw_parity(length: int, rng: random.Random) -> list[int]:
    bits = [rng.randrange(2) for _ in range(length - 1)]
    return [*bits, sum(bits) % 2]


def _judge_parity(tokens: Sequence[int]) -> list[int]:
    ones, classes = 0, []
    for token in tokens:
        ones += token
        classes.append(int(ones % 2 == 0))
    return classes


def _equal_runs(letters: int) -> Callable[[int, random.Random], list[int]]:
    """a…ab…b… with the same number of each of so many letters."""

    def draw(length: int, rng: random.Random) -> list[int]:
        return [letter for letter in range(letters) for _ in range(length // letters)]

    return draw


def _judge_runs(letters: int) -> Callable[[Sequence[int]], list[int]]:
    """Class of a prefix that ends in a run: 0 in the first one, i inside run i, i + 1 once it is full."""

    def judge(tokens: Sequence[int]) -> list[int]:
        counts, classes = [0] * letters, []
        for token in tokens:
            counts[token] += 1
            classes.append(token + (token > 0 and counts[token] == counts[0]))
        return classes

    return judge


def _draw_dyck(pairs: int, rng: random.Random) -> list[bool]:
    """A balanced string of `pairs` pairs, uniformly: True opens, False closes.

    By the cycle lemma: of the rotations of pairs + 1 openings and pairs closings exactly one stays positive;
    without its first opening it is balanced.
    """
    steps = [True] * (pairs + 1) + [False] * pairs
    rng.shuffle(steps)
    height, lowest, start = 0, 1, 0
    for i, opens in enumerate(steps):
        if height < lowest or (height == lowest and i):
            lowest, start = height, i
        height += 1 if opens else -1
    return (steps[start:] + steps[:start])[1:]


def _draw_shuffle(length: int, rng: random.Random) -> list[int]:
    pairs = length // 2
    round_pairs = sum(rng.randrange(2) for _ in range(pairs))
    kinds = [0] * (2 * round_pairs) + [1] * (2 * (pairs - round_pairs))
    rng.shuffle(kinds)
    sides = [iter(_draw_dyck(round_pairs, rng)), iter(_draw_dyck(pairs - round_pairs, rng))]
    return [2 * kind + (0 if next(sides[kind]) else 1) for kind in kinds]


def _judge_shuffle(tokens: Sequence[int]) -> list[int]:
    depths, classes = [0, 0], []
    for token in tokens:
        depths[token // 2] += 1 - 2 * (token % 2)
        classes.append((depths[0] > 0) + 2 * (depths[1] > 0))
    return classes


LANGUAGES: dict[str, Language] = {
    "parity": Language("01", 2, 1, _draw_parity, _judge_parity, many=True),
    "(aa)*": Language("a", 2, 2, lambda n, rng: [0] * n, lambda tokens: [i % 2 for i in range(len(tokens))]),
    "(abab)*": Language(
        "ab",
        2,
        4,
        lambda n, rng: [i % 2 for i in range(n)],
        lambda tokens: [int(i % 4 == 3) for i in range(len(tokens))],
    ),
    "a^n b^n": Language("ab", 3, 2, _equal_runs(2), _judge_runs(2)),
    "a^n b^n c^n": Language("abc", 4, 3, _equal_runs(3), _judge_runs(3)),
    "shuffle-2": Language("()[]", 4, 2, _draw_shuffle, _judge_shuffle, many=True),
}
"""The languages of the paper's Table 5, by name."""


def formal_samples(
    language: Language,
    count: int,
    low: int,
    high: int,
    rng: random.Random,
    without: Iterable[Sequence[int]] = (),
) -> list[Sample]:
    """`count` strings with lengths from `low` to `high`.

    If the language has many strings, none of `without` that is longer than `FEW` is drawn.
    """
    kept_out = {tuple(tokens) for tokens in without if language.many and len(tokens) > FEW}
    samples: list[Sample] = []
    while len(samples) < count:
        sample = language.sample(low, high, rng)
        if tuple(sample[0]) not in kept_out:
            samples.append(sample)
    return samples


def formal_batch(samples: Sequence[Sample], length: int) -> tuple[Tensor, Tensor]:
    """`tokens [B, T]` and `classes [B, T]`, int64, T = `length`.

    After the end of a string its tokens are 0 and its classes -100: a causal model cannot see them before.

    Raises:
        ValueError: a string longer than `length`.
    """
    longest = max(len(tokens) for tokens, _ in samples)
    if longest > length:
        raise ValueError(f"length must be at least {longest}, the longest string, got {length}")
    rows = [tokens + [0] * (length - len(tokens)) for tokens, _ in samples]
    classes = [judged + [IGNORE] * (length - len(judged)) for _, judged in samples]
    return torch.tensor(rows), torch.tensor(classes)
