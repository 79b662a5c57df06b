"""Formal languages against definitions of their own: regular expressions, and striking out pairs."""

from __future__ import annotations

import random
import re
from collections import Counter
from itertools import product

import pytest
import torch

from nested_learning.data.padding import IGNORE
from nested_learning.data.synthetic.formal import (
    LANGUAGES,
    Language,
    formal_batch,
    formal_samples,
)


def text_of(language: Language, tokens) -> str:
    return "".join(language.alphabet[token] for token in tokens)


def tokens_of(language: Language, text: str) -> list[int]:
    return [language.alphabet.index(letter) for letter in text]


def balanced(text: str) -> bool:
    """Whether pairs of neighbouring brackets can be struck out until nothing is left."""
    while "()" in text:
        text = text.replace("()", "")
    return not text


def in_shuffle(text: str) -> bool:
    square = re.sub(r"[()]", "", text).replace("[", "(").replace("]", ")")
    return balanced(re.sub(r"[\[\]]", "", text)) and balanced(square)


MEMBER = {
    "parity": lambda s: s.count("1") % 2 == 0,
    "(aa)*": lambda s: re.fullmatch(r"(aa)*", s) is not None,
    "(abab)*": lambda s: re.fullmatch(r"(abab)*", s) is not None,
    "a^n b^n": lambda s: any(s == "a" * n + "b" * n for n in range(len(s) + 1)),
    "a^n b^n c^n": lambda s: any(s == "a" * n + "b" * n + "c" * n for n in range(len(s) + 1)),
    "shuffle-2": in_shuffle,
}


def members(name: str, longest: int) -> list[str]:
    """All strings of a language up to a length, found by trying all strings."""
    alphabet = LANGUAGES[name].alphabet
    strings = ("".join(s) for n in range(1, longest + 1) for s in product(alphabet, repeat=n))
    return [s for s in strings if MEMBER[name](s)]


@pytest.mark.parametrize("name", LANGUAGES)
def test_every_string_is_in_the_language_and_no_string_of_its_length_is_missed(name: str) -> None:
    language, longest = LANGUAGES[name], 12 if len(LANGUAGES[name].alphabet) == 1 else 6
    samples = formal_samples(language, 3000, 1, longest, random.Random(0))
    assert {text_of(language, tokens) for tokens, _ in samples} == set(members(name, longest))


@pytest.mark.parametrize("name", LANGUAGES)
def test_long_strings_are_in_the_language_and_as_long_as_asked(name: str) -> None:
    language = LANGUAGES[name]
    for tokens, classes in formal_samples(language, 50, 51, 100, random.Random(1)):
        assert MEMBER[name](text_of(language, tokens))
        assert 51 <= len(tokens) == len(classes) <= 100
        assert max(classes) < language.classes <= language.vocabulary


@pytest.mark.parametrize("name", ["parity", "(aa)*", "(abab)*"])
def test_classes_of_regular_languages_say_whether_the_prefix_is_in_the_language(name: str) -> None:
    language = LANGUAGES[name]
    for tokens, classes in formal_samples(language, 50, 1, 40, random.Random(2)):
        text = text_of(language, tokens)
        assert classes == [int(MEMBER[name](text[:end])) for end in range(1, len(text) + 1)]


@pytest.mark.parametrize("name", ["a^n b^n", "a^n b^n c^n", "shuffle-2"])
def test_a_class_stands_for_one_set_of_what_may_follow(name: str) -> None:
    """What may follow a prefix is found among all strings of the language that start with it."""
    language, longest = LANGUAGES[name], {"a^n b^n": 8, "a^n b^n c^n": 6, "shuffle-2": 4}[name]
    known = members(name, {"a^n b^n": 12, "a^n b^n c^n": 9, "shuffle-2": 8}[name])
    sets: dict[int, set[str]] = {}
    for text in (s for s in known if len(s) <= longest):
        for end, judged in enumerate(language.judge(tokens_of(language, text)), start=1):
            follows = "".join(sorted({s[end : end + 1] for s in known if s.startswith(text[:end])}))
            sets.setdefault(judged, set()).add(follows)
    assert all(len(found) == 1 for found in sets.values())
    assert len({next(iter(found)) for found in sets.values()}) == len(sets) == language.classes


@pytest.mark.parametrize(
    ("name", "text", "classes"),
    [
        ("parity", "0110", [1, 0, 1, 1]),
        ("(aa)*", "aaaa", [0, 1, 0, 1]),
        ("(abab)*", "abababab", [0, 0, 0, 1, 0, 0, 0, 1]),
        ("a^n b^n", "aabb", [0, 0, 1, 2]),
        ("a^n b^n", "ab", [0, 2]),
        ("a^n b^n c^n", "aabbcc", [0, 0, 1, 2, 2, 3]),
        ("a^n b^n c^n", "abc", [0, 2, 3]),
        ("shuffle-2", "([)](())", [1, 3, 2, 0, 1, 1, 1, 0]),
    ],
)
def test_small_strings_by_hand(name: str, text: str, classes: list[int]) -> None:
    language = LANGUAGES[name]
    assert language.judge(tokens_of(language, text)) == classes


def test_lengths_and_strings_of_a_length_are_uniform() -> None:
    samples = formal_samples(LANGUAGES["parity"], 4000, 1, 4, random.Random(3))
    texts = Counter(text_of(LANGUAGES["parity"], tokens) for tokens, _ in samples)
    for text, count in texts.items():  # each length 1000 times, each of its 2^(n−1) strings equally often
        expected = 1000 / 2 ** (len(text) - 1)
        assert abs(count - expected) < 5 * expected**0.5
    nested = formal_samples(LANGUAGES["shuffle-2"], 5000, 6, 6, random.Random(4))
    round_only = Counter(text_of(LANGUAGES["shuffle-2"], t) for t, _ in nested if max(t) < 2)
    assert len(round_only) == 5 and sum(round_only.values()) == pytest.approx(625, abs=100)
    assert all(abs(count - 125) < 55 for count in round_only.values())


def test_long_held_out_strings_are_kept_out_where_there_are_many() -> None:
    for name, kept in (("parity", True), ("shuffle-2", True), ("(aa)*", False)):
        language = LANGUAGES[name]
        rng = random.Random(5)
        low = 13 if language.step == 1 else 14
        held = [tokens for tokens, _ in formal_samples(language, 3000, low, low, rng)]
        drawn = [tokens for tokens, _ in formal_samples(language, 500, 2, low, rng, held)]
        assert all(tokens not in held for tokens in drawn) == kept
        short = [tokens for tokens, _ in formal_samples(language, 20, 2, 2, rng)]
        assert len(formal_samples(language, 5, 2, 2, rng, short)) == 5


def test_batches_have_one_shape_and_ignore_what_is_behind_the_end() -> None:
    samples = formal_samples(LANGUAGES["a^n b^n"], 5, 2, 8, random.Random(6))
    tokens, classes = formal_batch(samples, 10)
    assert tokens.shape == classes.shape == (5, 10) and tokens.dtype == classes.dtype == torch.int64
    for row, judged, (string, expected) in zip(tokens.tolist(), classes.tolist(), samples, strict=True):
        assert row == string + [0] * (10 - len(string))
        assert judged == expected + [IGNORE] * (10 - len(string))


def test_what_cannot_be_drawn_is_refused() -> None:
    with pytest.raises(ValueError, match="lengths must hold a multiple of 4, got 5 to 7"):
        formal_samples(LANGUAGES["(abab)*"], 1, 5, 7, random.Random(0))
    samples = formal_samples(LANGUAGES["(aa)*"], 1, 8, 8, random.Random(0))
    with pytest.raises(ValueError, match="length must be at least 8, the longest string, got 7"):
        formal_batch(samples, 7)


def test_the_same_seed_draws_the_same_strings() -> None:
    first, again = (formal_samples(LANGUAGES["shuffle-2"], 9, 2, 50, random.Random(7)) for _ in range(2))
    assert first == again
