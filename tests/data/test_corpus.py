"""Corpora: disjoint parts, statistics against hand computation, cache, errors."""

import hashlib
import math
import re
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import pytest

from nested_learning.data import (
    ByteTokenizer,
    TokenizerConfig,
    bundled_files,
    prepare_corpus,
    train_tokenizer,
)
from nested_learning.data.corpus import (
    DOCUMENT_SEPARATOR,
    default_cache_dir,
    split_documents,
    split_validation,
    unigram_entropy,
)

BYTE = TokenizerConfig(kind="byte", vocab_size=257)


@pytest.fixture
def files(tmp_path):
    """Two small files of several documents; every word occurs once, so that leaks are visible."""
    paths = []
    for name in ("a", "b"):
        documents = [" ".join(f"{name}{doc}w{word}" for word in range(40)) for doc in range(5)]
        path = tmp_path / f"{name}.txt"
        path.write_text(DOCUMENT_SEPARATOR.join(documents) + "\n", encoding="utf-8")
        paths.append(path)
    return paths


@pytest.mark.parametrize("fraction", [0.01, 0.2, 0.5, 0.9])
def test_split_is_a_cut(files, fraction):
    text = files[0].read_text()
    train, valid = split_validation(text, fraction)
    assert train + valid == text
    assert abs(len(valid) / len(text) - fraction) < 0.02
    assert set(train.split()).isdisjoint(valid.split())  # no word is cut in two


def test_split_does_not_break_a_separator():
    text = "x" * 10 + DOCUMENT_SEPARATOR + "y" * 10
    for target in range(1, 23):
        train, valid = split_validation(text, 1 - target / 23)
        rest = "y" * min(10, 23 - target)  # inside the second word there is no white space to wait for
        assert split_documents(valid) == [rest]
        assert split_documents(train) == [part for part in ("x" * 10, "y" * (10 - len(rest))) if part]


def test_parts_hold_the_text_and_do_not_overlap(files, tmp_path):
    corpus = prepare_corpus(files, BYTE, tmp_path / "cache", valid_fraction=0.2)
    train, valid = (_documents(part) for part in (corpus.train, corpus.valid))
    assert set(" ".join(train).split()).isdisjoint(" ".join(valid).split())
    assert sorted(" ".join(train + valid).split()) == sorted(
        word for path in files for word in path.read_text().split()
    )
    assert {word[0] for word in " ".join(valid).split()} == {"a", "b"}  # the tail of every file
    assert corpus.train[-1] == corpus.valid[-1] == 256
    assert corpus.train.dtype == np.uint16
    assert isinstance(corpus.train, np.memmap) and isinstance(corpus.valid, np.memmap)


def _documents(tokens):
    """Cut at the end token, independently of the library's own splitting."""
    pieces = bytes(255 if token == 256 else token for token in tokens.tolist()).split(b"\xff")
    return [piece.decode() for piece in pieces if piece]


def test_unigram_entropy_by_hand():
    train = np.array([0, 0, 0, 1], dtype=np.uint16)
    valid = np.array([0, 1, 2], dtype=np.uint16)
    # add one over 3 types: p = 4/7, 2/7, 1/7
    expected = -(math.log(4 / 7) + math.log(2 / 7) + math.log(1 / 7)) / 3
    assert unigram_entropy(train, valid, 3) == pytest.approx(expected, rel=1e-12)


def test_statistics_of_a_corpus(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("aaaa aaaa éé", encoding="utf-8")
    corpus = prepare_corpus([path], BYTE, tmp_path, valid_fraction=0.2)
    assert corpus.valid.tolist() == [0xC3, 0xA9, 0xC3, 0xA9, 256]
    assert corpus.bytes_per_token == 4 / 5
    # train: 8 "a", 2 spaces, 1 end; 11 tokens, 257 types; neither byte of "é" occurs
    expected = -(4 * math.log(1 / 268) + math.log(2 / 268)) / 5
    assert corpus.unigram_entropy == pytest.approx(expected, rel=1e-12)


def test_tokenizer_is_trained_on_the_training_part_only(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("seen words here " * 50 + "qqqq " * 160)
    spec = TokenizerConfig(kind="bpe", vocab_size=275)
    seen = prepare_corpus([path], spec, tmp_path, valid_fraction=0.6).tokenizer
    everything = prepare_corpus([path], spec, tmp_path, valid_fraction=0.1).tokenizer
    assert len(everything.encode("qqqq")) < 4
    assert seen.encode("qqqq") == [2 + ord("q")] * 4  # four bytes: never seen in training


def test_second_call_reads_the_cache(files, tmp_path, monkeypatch):
    spec = TokenizerConfig(kind="bpe", vocab_size=300)
    first = prepare_corpus(files, spec, tmp_path / "cache")
    monkeypatch.setattr(
        "nested_learning.data.corpus.train_tokenizer", lambda *_: pytest.fail("trained again")
    )
    second = prepare_corpus(files, spec, tmp_path / "cache")
    assert np.array_equal(first.train, second.train) and np.array_equal(first.valid, second.valid)
    assert first.tokenizer.fingerprint == second.tokenizer.fingerprint
    assert first.provenance == second.provenance
    assert (first.unigram_entropy, first.bytes_per_token) == (second.unigram_entropy, second.bytes_per_token)


def test_cache_key_follows_content_tokenizer_and_fraction(files, tmp_path):
    cache = tmp_path / "cache"
    keys = [
        prepare_corpus(files, BYTE, cache).provenance["key"],
        prepare_corpus(files[::-1], BYTE, cache).provenance["key"],
        prepare_corpus(files, BYTE, cache, valid_fraction=0.1).provenance["key"],
        prepare_corpus(files, TokenizerConfig(vocab_size=300), cache).provenance["key"],
    ]
    files[0].write_text(files[0].read_text() + "more words here at the end\n")
    keys.append(prepare_corpus(files, BYTE, cache).provenance["key"])
    assert len(set(keys)) == 5
    assert {folder.name for folder in (cache / "corpora").iterdir()} == set(keys)  # no drafts left behind


def test_a_ready_tokenizer_is_used_as_it_is(files, tmp_path):
    ready = train_tokenizer(TokenizerConfig(vocab_size=290), [files[0].read_text()])
    corpus = prepare_corpus(files, ready, tmp_path / "cache")
    assert corpus.tokenizer is ready
    assert corpus.provenance["tokenizer"] == ready.fingerprint
    first = split_documents(files[0].read_text())[0]
    assert corpus.train[: len(ready.encode(first))].tolist() == ready.encode(first)


class WideTokenizer(ByteTokenizer):
    """More ids than 16 bits hold."""

    vocab_size = 65_537
    eos_id = 65_536
    fingerprint = "wide"


def test_large_vocabulary_takes_32_bits(files, tmp_path):
    corpus = prepare_corpus(files, WideTokenizer(), tmp_path / "cache")
    assert corpus.train.dtype == np.uint32 and corpus.train[-1] == 65_536


def _key_and_sum(files, cache):
    corpus = prepare_corpus(files, TokenizerConfig(vocab_size=300), cache)
    return corpus.provenance["key"], int(corpus.train.sum())


def test_parallel_processes_agree(files, tmp_path):
    cache = tmp_path / "cache"
    with ProcessPoolExecutor(3, mp_context=get_context("fork")) as pool:
        results = list(pool.map(_key_and_sum, [files] * 3, [cache] * 3))
    assert len(set(results)) == 1
    assert [folder.name for folder in (cache / "corpora").iterdir()] == [results[0][0]]


def test_losing_the_race_keeps_the_winner(files, tmp_path, monkeypatch):
    """Another process finishes between our look and our rename."""
    cache, place = tmp_path / "cache", "nested_learning.data.corpus.train_tokenizer"
    spec = TokenizerConfig(kind="byte", vocab_size=257)

    def train_while_another_finishes(config, texts):
        monkeypatch.setattr(place, train_tokenizer)
        prepare_corpus(files, spec, cache)
        return train_tokenizer(config, texts)

    monkeypatch.setattr(place, train_while_another_finishes)
    key = prepare_corpus(files, spec, cache).provenance["key"]
    assert [folder.name for folder in (cache / "corpora").iterdir()] == [key]


def test_default_cache_dir(monkeypatch, tmp_path):
    monkeypatch.setenv("NESTED_LEARNING_CACHE", str(tmp_path))
    assert default_cache_dir() == tmp_path
    monkeypatch.delenv("NESTED_LEARNING_CACHE")
    monkeypatch.setenv("HOME", "/somewhere")
    assert str(default_cache_dir()) == "/somewhere/.cache/nested_learning"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"bad\.txt is empty"),
        (b" \n\f\n ", r"bad\.txt is empty"),
        (b"ok \xff", r"bad\.txt is not UTF-8: bad byte at offset 3"),
        (b"word ", r"bad\.txt is too short to split"),
    ],
)
def test_bad_file_is_named(files, tmp_path, content, message):
    bad = tmp_path / "bad.txt"
    bad.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        prepare_corpus([*files, bad], BYTE, tmp_path / "cache")


def test_bad_arguments_are_named(files, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.txt does not exist"):
        prepare_corpus([tmp_path / "none.txt"], BYTE, tmp_path)
    with pytest.raises(ValueError, match="empty list"):
        prepare_corpus([], BYTE, tmp_path)
    for fraction in (0.0, 1.0, -0.1):
        with pytest.raises(ValueError, match=f"valid_fraction={fraction} must lie"):
            prepare_corpus(files, BYTE, tmp_path, valid_fraction=fraction)


def test_bundled_files_are_the_documented_ones():
    paths = bundled_files()
    assert [path.name for path in paths] == ["novel.txt", "plays.txt", "scripture.txt", "speeches.txt"]
    readme = (paths[0].parent / "README.md").read_text(encoding="utf-8")
    documented = dict(re.findall(r"(?m)^    ([0-9a-f]{64})  (\S+)$", readme))
    for path in paths:
        assert documented[hashlib.sha256(path.read_bytes()).hexdigest()] == path.name
        assert 800_000 < path.stat().st_size < 1_500_000


def test_bundled_documents():
    counts = {path.name: len(split_documents(path.read_bytes().decode())) for path in bundled_files()}
    assert counts == {"novel.txt": 135, "plays.txt": 8, "scripture.txt": 27, "speeches.txt": 24}
    for path in bundled_files():
        text = path.read_bytes().decode("utf-8")
        assert "gutenberg" not in text.lower() and "\n\n\n" not in text and "\r" not in text
