"""Shards as one array: every slice equals that of the concatenation; other processes open their own maps."""

import json
import pickle

import numpy as np
import pytest

from nested_learning.data.shards import ShardFolder, ShardSet, Tokens


@pytest.fixture
def parts():
    return [np.arange(start, stop, dtype=np.uint16) for start, stop in ((0, 5), (5, 5), (5, 6), (6, 13))]


def test_every_slice_of_the_parts_is_that_of_the_whole(parts):
    tokens, whole = Tokens(parts), np.concatenate(parts)
    assert len(tokens) == 13
    for start in range(-14, 15):
        for stop in range(-14, 15):
            assert tokens[start:stop].tolist() == whole[start:stop].tolist()
    assert np.shares_memory(tokens[6:9], parts[3])  # no copy inside one part
    nested = Tokens([Tokens(parts), np.arange(13, 15, dtype=np.uint16)])
    assert nested[3:14].tolist() == list(range(3, 14))
    with pytest.raises(ValueError, match="step 1 only, got 2"):
        tokens[::2]


def test_no_parts():
    assert len(Tokens([])) == 0 and len(Tokens([])[0:3]) == 0


def write_set(folder, sizes):
    for number, size in enumerate(sizes):
        np.arange(size, dtype="<u2").tofile(folder / f"train-{number:05d}.bin")
    np.asarray([0, 4], "<u8").tofile(folder / "train.starts")
    np.arange(32, dtype=np.uint8).tofile(folder / "train.hashes")
    return ShardSet(folder, "train", "<u2", sizes)


def test_a_pickled_set_is_small_and_equal(tmp_path):
    tokens = write_set(tmp_path, [5000, 5000])
    data = pickle.dumps(tokens)
    assert len(data) < 1000  # paths, not tokens
    again = pickle.loads(data)
    assert again[4990:5010].tolist() == tokens[4990:5010].tolist()
    assert again.starts.tolist() == [0, 4] and again.hashes.shape == (2, 16)


def test_a_folder_of_another_version_is_refused(tmp_path):
    (tmp_path / "mixture.json").write_text('{"version": 99, "sources": {}}')
    with pytest.raises(ValueError, match="has version 99, this code reads 1"):
        ShardFolder(tmp_path)


def test_an_unknown_split_is_named(tmp_path):
    manifest = {"version": 1, "sources": {}, "dtype": "<u2", "settings": {}, "tokenizer": {"vocab_size": 9}}
    (tmp_path / "mixture.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="split must be one of train, valid, long, got 'test'"):
        ShardFolder(tmp_path).open("test")
