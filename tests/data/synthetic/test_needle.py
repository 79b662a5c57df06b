"""The needle grammar against a reader of its words."""

import random
import re

import pytest

from nested_learning.data.synthetic.needle import (
    ANSWER,
    KEYS,
    NOISE,
    WORDS,
    decode_words,
    encode_words,
    needle_batch,
    needle_sample,
)

FACT = re.compile(r"One of the special magic numbers for (\w+) is : (\d) (\d) (\d) \. ?")
ASKED = re.compile(r" What is the special magic number for (\w+) \? The special magic number for (\w+) is :$")


def read(prompt: list[int]) -> tuple[dict[str, str], str, str]:
    """Numbers by key, the key asked for, and the haystack, from the words alone."""
    text = decode_words(prompt)
    asked = ASKED.search(text)
    assert asked is not None and asked[1] == asked[2]
    context = text[: asked.start()]
    facts = {key: "".join(digits) for key, *digits in FACT.findall(context)}
    return facts, asked[1], FACT.sub("", context)


@pytest.mark.parametrize(("length", "needles"), [(64, 1), (128, 1), (512, 1), (160, 4)])
def test_a_reader_finds_the_answer_and_nothing_but_noise_around(length: int, needles: int) -> None:
    rng = random.Random(0)
    endless = " ".join(NOISE * 40)
    for _ in range(40):
        prompt, answer = needle_sample(length, rng, None, needles)
        facts, asked, noise = read(prompt)
        assert len(prompt) + len(answer) == length and len(answer) == ANSWER
        assert len(facts) == needles and set(facts) <= set(KEYS)
        assert "".join(decode_words(answer).split()) == facts[asked]
        assert noise.strip() in endless and noise.rstrip().endswith(".")


def test_the_needle_asked_for_stands_at_its_depth() -> None:
    rng = random.Random(1)
    for depth in (0.0, 0.3, 0.5, 1.0):
        for needles in (1, 3):
            prompt, _ = needle_sample(400, rng, depth, needles)
            _, asked, noise = read(prompt)
            before, after = decode_words(prompt).split(f"One of the special magic numbers for {asked} is", 1)
            words = len(FACT.sub("", before).split())
            total = len(noise.split())
            assert abs(words / total - depth) <= 3 / total
            assert before == "" or before.endswith(". ")


def test_keys_values_and_depths_are_spread() -> None:
    rng = random.Random(2)
    samples = [needle_sample(64, rng) for _ in range(2000)]
    assert {read(prompt)[1] for prompt, _ in samples} == set(KEYS)
    assert len({tuple(answer) for _, answer in samples}) > 800
    first = sum(decode_words(prompt).startswith("One of the special") for prompt, _ in samples)
    assert 150 < first < 350  # 31 words of noise leave about eight places


def test_words_come_back_and_are_all_different() -> None:
    assert len(set(WORDS)) == len(WORDS)
    assert decode_words(encode_words(" ".join(WORDS))) == " ".join(WORDS)


def test_targets_are_the_answers_only() -> None:
    tokens, targets = needle_batch(8, 64, random.Random(3))
    assert tokens.shape == targets.shape == (8, 63)
    for row, target in zip(tokens.tolist(), targets.tolist(), strict=True):
        facts, asked, _ = read(row[: 64 - ANSWER])
        assert "".join(decode_words(target[-ANSWER:]).split()) == facts[asked]
        assert target[:-ANSWER] == [-100] * (63 - ANSWER)


def test_same_seed_same_samples() -> None:
    first, again, other = (needle_sample(64, random.Random(seed)) for seed in (1, 1, 2))
    assert first == again != other


def test_input_that_is_not_allowed() -> None:
    rng = random.Random(0)
    with pytest.raises(ValueError, match="length must be at least 39 for 1 needles, got 38"):
        needle_sample(38, rng)
    needle_sample(39, rng)
    with pytest.raises(ValueError, match=r"depth must be in \[0, 1\] or None, got 1.5"):
        needle_sample(64, rng, 1.5)
    with pytest.raises(ValueError, match="needles must be from 1 to 32, got 0"):
        needle_sample(64, rng, None, 0)
