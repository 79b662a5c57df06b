"""Copies: signatures against exact Jaccard similarity, bands by their probability, keys against a set."""

import numpy as np
import pytest
from texts import WORDS, document

from nested_learning.data.config import DedupConfig
from nested_learning.data.pipeline.dedup import BandKeys, KeySet, document_digest, gram_hashes, words_of


def grams(text):
    words = list(words_of(text))
    return {tuple(words[i : i + 5]) for i in range(max(1, len(words) - 4))}


def jaccard(a, b):
    return len(grams(a) & grams(b)) / len(grams(a) | grams(b))


def changed(text, every, rng):
    """`text` with about one word in `every` replaced."""
    words = text.split()
    return " ".join(rng.choice(WORDS) if rng.random() < 1 / every else word for word in words)


def test_hashes_of_runs_are_those_of_the_runs():
    words = list(words_of(document(1, 300)))
    hashes = gram_hashes(words)
    seen = {}
    for i, value in enumerate(hashes.tolist()):
        assert seen.setdefault(value, words[i : i + 5]) == words[i : i + 5]
    assert len(hashes) == 300 + 30 * 3 - 4  # each of the 30 lines begins with "Line 1-0", three words
    assert len(gram_hashes(["a"])) == 1 and len(gram_hashes([])) == 0


def test_signature_estimates_jaccard():
    rng = np.random.default_rng(0)
    keys = BandKeys(DedupConfig(bands=64, rows=8), seed=3)
    for every in (200, 40, 15, 5):
        text = document(int(rng.integers(1000)), 600)
        other = changed(text, every, rng)
        agree = (keys.signature(text) == keys.signature(other)).mean()
        s = jaccard(text, other)
        assert abs(agree - s) < 4 * np.sqrt(s * (1 - s) / 512) + 0.01


def test_bands_meet_with_the_stated_probability():
    keys = BandKeys(DedupConfig(bands=4, rows=3), seed=0)
    rng = np.random.default_rng(1)
    hits, expected, variance = 0, 0.0, 0.0
    for seed in range(300):
        text = document(seed, 150)
        other = changed(text, 12, rng)
        hits += bool((keys(text) == keys(other)).any())
        p = 1 - (1 - jaccard(text, other) ** 3) ** 4
        expected, variance = expected + p, variance + p * (1 - p)
    assert abs(hits - expected) < 4 * np.sqrt(variance)
    assert 60 < expected < 240  # the test could fail on either side


def test_keys_depend_on_text_seed_and_band_only():
    config = DedupConfig()
    text = document(5)
    assert np.array_equal(BandKeys(config, 1)(text), BandKeys(config, 1)(text))
    assert not (BandKeys(config, 1)(text) == BandKeys(config, 2)(text)).any()
    assert len(set(BandKeys(config, 1)(text).tolist())) == config.bands


def test_digest_ignores_white_space_at_the_ends_only():
    assert document_digest(" a b\n") == document_digest("a b")
    assert document_digest("a  b") != document_digest("a b")


def test_key_set_is_a_set():
    rng = np.random.default_rng(0)
    keys, oracle = KeySet(), set()
    for _ in range(60):
        new = rng.integers(0, 1 << 18, 3000).astype(np.uint64) << np.uint64(40)
        keys.add(new)
        oracle.update(new.tolist())
        assert len(keys) >= len(oracle)
        for probe in rng.integers(0, 1 << 18, 50).astype(np.uint64) << np.uint64(40):
            assert keys.contains_any(np.asarray([probe])) == (int(probe) in oracle)
    assert len(keys._recent) < 1 << 16  # most keys are in the compact array
    assert not keys.contains_any(np.zeros(0, np.uint64))


@pytest.mark.parametrize("name", ["bands", "rows"])
def test_bad_settings_are_named(name):
    with pytest.raises(ValueError, match=f"dedup.{name} must be at least 1, got 0"):
        DedupConfig(**{name: 0})
