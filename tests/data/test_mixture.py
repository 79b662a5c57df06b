"""Rows and lines: documents cut by a loop, weights, epochs, ranks and workers, resume, bucketing, lengths."""

import json
from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch
from test_shards import write_set
from torch.utils.data import DataLoader

from nested_learning.data import LoaderConfig, TokenLoader, TokenMixture, WorkerBatches, split_batch
from nested_learning.data.config import Stage
from nested_learning.data.loader import BUCKET_BATCHES, cut_rows
from nested_learning.data.mixture import PATTERN, Rows, RowSequence, interleave
from nested_learning.data.packing import split_documents
from nested_learning.data.padding import IGNORE
from nested_learning.data.shards import ShardSet

SEQ = 6
DOCUMENTS = LoaderConfig(crossing=False)


def marked(mark, count):
    """A token set of `count` windows; a window's tokens all say which set and window it is."""
    return np.repeat(np.arange(count, dtype=np.uint32) + 1000 * mark, SEQ + 1)


def document_set(folder, lengths):
    """A set of documents: document d has the tokens 100 d + 1, 100 d + 2, … and the end token 0."""
    folder.mkdir(exist_ok=True)
    texts = [[100 * d + i + 1 for i in range(length - 1)] + [0] for d, length in enumerate(lengths)]
    flat = np.concatenate(texts).astype("<u2")
    flat[: len(flat) // 2].tofile(folder / "train-00000.bin")
    flat[len(flat) // 2 :].tofile(folder / "train-00001.bin")
    np.cumsum([0, *lengths[:-1]]).astype("<u8").tofile(folder / "train.starts")
    np.zeros(16 * len(lengths), np.uint8).tofile(folder / "train.hashes")
    sizes = [len(flat) // 2, len(flat) - len(flat) // 2]
    return ShardSet(folder, "train", "<u2", sizes), texts


LENGTHS = [2, 3, SEQ, SEQ + 1, SEQ + 2, 2 * SEQ, 2 * SEQ + 1, 2 * SEQ + 2, 31, 2]


def naive_rows(texts):
    """Each token but a document's first is a target exactly once, and no row holds two documents."""
    rows = []
    for text in texts:
        at = 0
        while at < len(text) - 1:
            row = text[at : at + SEQ + 1]
            rows.append(row + [IGNORE] * (SEQ + 1 - len(row)))
            at += SEQ
    return rows


def test_rows_of_documents_are_those_of_a_loop(tmp_path):
    tokens, texts = document_set(tmp_path, LENGTHS)
    rows = Rows(tokens, SEQ, crossing=False)
    expected = naive_rows(texts)
    assert [rows[i].tolist() for i in range(len(rows))] == expected
    lengths = [sum(t != IGNORE for t in row) for row in expected]
    assert rows.lengths(np.arange(len(rows))).tolist() == lengths
    assert rows.padding() == pytest.approx(1 - sum(lengths) / (len(expected) * (SEQ + 1)))
    targets = Counter(t for row in expected for t in row[1:] if t not in (IGNORE, 0))
    assert targets == Counter(t for text in texts for t in text[1:-1])


def test_a_document_of_one_token_is_a_row(tmp_path):
    tokens, _ = document_set(tmp_path, [1, 3])
    rows = Rows(tokens, SEQ, crossing=False)
    assert [rows[i].tolist()[:4] for i in range(len(rows))] == [[0, *[IGNORE] * 3], [101, 102, 0, IGNORE]]


def test_crossing_rows_are_windows_of_the_stream(tmp_path):
    tokens, texts = document_set(tmp_path, LENGTHS)
    flat = [token for text in texts for token in text]
    rows = Rows(tokens, SEQ, crossing=True)
    assert [rows[i].tolist() for i in range(len(rows))] == [
        flat[i : i + SEQ + 1] for i in range(0, len(flat) - SEQ, SEQ + 1)
    ]


def test_documents_must_be_known():
    with pytest.raises(ValueError, match="crossing = false needs tokens that know their documents"):
        TokenLoader(marked(0, 9), SEQ, 2, 0, options=DOCUMENTS)


@pytest.mark.parametrize("weights", [[1, 1], [3, 1], [0.7, 0.2, 0.1], [1e-6, 1.0], [5.0]])
def test_turns_follow_the_weights_in_every_stretch(weights):
    pattern = interleave(weights)
    share = np.asarray(weights) / sum(weights)
    counts = np.bincount(pattern, minlength=len(weights))
    assert counts.sum() == PATTERN and (np.abs(counts - np.maximum(1, share * PATTERN)) <= 1).all()
    for start in range(0, PATTERN, 97):
        stretch = np.bincount(pattern[start : start + 200], minlength=len(weights))
        assert (np.abs(stretch - share * min(200, PATTERN - start)) < len(weights) + 1).all()


@pytest.mark.parametrize("shuffle", [True, False])
def test_each_set_is_used_once_per_its_epoch(shuffle):
    sets = [marked(mark, count) for mark, count in ((0, 50), (1, 7), (2, 23))]
    line = RowSequence(TokenMixture(sets, [2, 1, 1]), SEQ, True, seed=3, shuffle=shuffle)
    taken = {0: [], 1: [], 2: []}
    for place in range(2 * PATTERN):
        row = line[place]
        assert (row == row[0]).all()
        taken[int(row[0]) // 1000].append(int(row[0]) % 1000)
    assert [len(taken[mark]) for mark in range(3)] == [PATTERN, PATTERN // 2, PATTERN // 2]
    for mark, count in ((0, 50), (1, 7), (2, 23)):
        epochs = [taken[mark][i : i + count] for i in range(0, len(taken[mark]) - count, count)]
        assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
        assert (epochs[0] != epochs[1]) == shuffle


def test_sets_without_weights_are_one_epoch_together():
    line = RowSequence(TokenMixture([marked(0, 11), marked(1, 6)]), SEQ, True, seed=0, shuffle=True)
    for epoch in range(3):
        seen = sorted(int(line[place][0]) for place in range(17 * epoch, 17 * (epoch + 1)))
        assert seen == [*range(11), *range(1000, 1006)]


def make(options=None, rank=0, world_size=1, tokens=None, size=12, **more):
    tokens = marked(0, 61) if tokens is None else tokens
    return TokenLoader(tokens, SEQ, size // world_size, 5, True, rank, world_size, options, **more)


def test_two_ranks_two_workers_two_epochs():
    """Every window once per epoch, another order in the next, and the batches of the plain loader."""
    options = LoaderConfig(workers=2)
    count, steps = 60, 10  # 60 windows, 12 a step: epochs end with a step
    tokens = marked(0, count)
    ranks = [make(options, rank, 2, tokens) for rank in range(2)]
    plain = make(tokens=tokens)
    epochs = [[], []]
    for step in range(steps):
        batch = torch.cat([next(loader) for loader in ranks])
        assert torch.equal(batch, next(plain))
        epochs[step // 5] += batch[:, 0].tolist()
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(count))
    assert epochs[0] != epochs[1]


def mixtures(folder):
    documents, _ = document_set(folder, LENGTHS * 4)
    more, _ = document_set(folder / "more", [5, 40, 3, 17] * 6)
    weighted = TokenMixture([documents, more], [1.0, 2.0])
    yield LoaderConfig(), marked(0, 61)
    yield LoaderConfig(), TokenMixture([marked(0, 40), marked(1, 30)], [1, 3])
    yield DOCUMENTS, documents
    yield DOCUMENTS, weighted
    yield LoaderConfig(crossing=False, bucketing=True), weighted
    yield LoaderConfig(crossing=False, packing=True), weighted
    yield LoaderConfig(curriculum=(Stage(until_step=4, seq_len=2), Stage(until_step=9, seq_len=3))), weighted


@pytest.mark.thorough
@pytest.mark.parametrize("case", range(7))
def test_resume_anywhere_on_other_ranks_and_workers(tmp_path, case):
    """Stop after any number of steps, go on with other ranks (once with workers): the same batches follow."""
    options, tokens = list(mixtures(tmp_path))[case]
    rng = np.random.default_rng(case)
    straight = list(islice(make(options, tokens=tokens), 30))
    for trial in range(6):
        before, after = (int(rng.choice([1, 2, 3])) for _ in range(2))
        steps = int(rng.integers(0, 20))
        first = [make(options, rank, before, tokens) for rank in range(before)]
        for i in range(steps):
            assert same([next(loader) for loader in first], straight[i])
        state = json.loads(json.dumps(first[-1].state_dict()))
        assert all(loader.state_dict() == first[0].state_dict() for loader in first)
        changed = options
        if trial == 0:
            changed = LoaderConfig(
                crossing=options.crossing,
                bucketing=options.bucketing,
                packing=options.packing,
                curriculum=options.curriculum,
                workers=2,
            )
        second = [make(changed, rank, after, tokens) for rank in range(after)]
        for loader in second:
            loader.load_state_dict(state)
        for i in range(steps, steps + 5):
            assert same([next(loader) for loader in second], straight[i])


@pytest.mark.parametrize("case", range(7))
def test_reading_ahead_in_a_thread_changes_nothing(tmp_path, monkeypatch, case):
    """As for CUDA, also of a loader that goes on where another one stopped."""
    monkeypatch.setattr(
        torch.Tensor, "pin_memory", lambda batch: batch.clone()
    )  # the real one needs a driver
    options, tokens = list(mixtures(tmp_path))[case]
    straight = list(islice(make(options, tokens=tokens), 12))
    first, second = (make(options, tokens=tokens, pin_memory=True) for _ in range(2))
    assert all(map(torch.equal, islice(first, 5), straight))
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert all(map(torch.equal, islice(second, 7), straight[5:]))


def same(parts, whole):
    return torch.equal(torch.cat(parts), whole)


def test_a_loader_inside_of_a_data_loader():
    loader = make()
    served = DataLoader(WorkerBatches(loader, 3, num_steps=7), batch_size=None, num_workers=2)
    assert [b.tolist() for b in served] == [loader.batch(3 + i).tolist() for i in range(7)]


def test_state_of_other_options_is_refused(tmp_path):
    documents, _ = document_set(tmp_path, LENGTHS)
    state = make(tokens=documents, size=2).state_dict()
    with pytest.raises(ValueError, match="has windows=|has crossing=True, this loader has crossing=False"):
        make(DOCUMENTS, tokens=documents, size=2).load_state_dict(state)
    pair = [marked(0, 20), marked(1, 20)]
    with pytest.raises(ValueError, match=r"weights=\[1.0, 1.0\], this loader has weights=\[1.0, 2.0\]"):
        make(tokens=TokenMixture(pair, [1, 2])).load_state_dict(
            make(tokens=TokenMixture(pair, [1, 1])).state_dict()
        )


def test_bucketing_uses_the_same_rows_with_less_padding(tmp_path):
    rng = np.random.default_rng(0)
    lengths = [int(n) for n in rng.integers(2, 200, 700)]
    tokens = _long_set(tmp_path, lengths)
    size, seq_len = 4, 160

    def batches(options):
        loader = TokenLoader(tokens, seq_len, size, 1, options=options)
        return [next(loader) for _ in range(BUCKET_BATCHES)]

    plain, bucketed = batches(DOCUMENTS), batches(LoaderConfig(crossing=False, bucketing=True))
    assert rows_of(plain) == rows_of(bucketed)
    padding = [sum((b == IGNORE).sum() for b in bs) / sum(b.numel() for b in bs) for bs in (plain, bucketed)]
    assert padding[1] < 0.2 < 0.3 < padding[0]
    widths = {batch.shape[1] - 1 for batch in bucketed}
    assert all(width % 32 == 0 for width in widths) and len(widths) > 2


def rows_of(batches):
    return sorted(tuple(t for t in row if t != IGNORE) for batch in batches for row in batch.tolist())


def _long_set(folder, lengths):
    flat = np.concatenate([np.arange(n) + 200 * d for d, n in enumerate(lengths)]).astype("<u4")
    flat.tofile(folder / "train-00000.bin")
    np.cumsum([0, *lengths[:-1]]).astype("<u8").tofile(folder / "train.starts")
    np.zeros(16 * len(lengths), np.uint8).tofile(folder / "train.hashes")
    return ShardSet(folder, "train", "<u4", [len(flat)])


def test_ranks_share_the_shape_of_a_trimmed_batch(tmp_path):
    tokens = _long_set(tmp_path, [int(n) for n in np.random.default_rng(0).integers(2, 200, 700)])
    options = LoaderConfig(crossing=False, bucketing=True)
    ranks = [TokenLoader(tokens, 160, 2, 1, rank=rank, world_size=2, options=options) for rank in range(2)]
    for _ in range(20):
        a, b = (next(loader) for loader in ranks)
        assert a.shape == b.shape


@pytest.mark.parametrize("block", [1, 4, 7, 32, 160])
def test_packed_rows_hold_the_same_pieces_with_less_padding(tmp_path, block):
    """Every piece once, at a multiple of the block, told apart by padding, and with the same targets."""
    rng = np.random.default_rng(0)
    lengths = [int(n) for n in np.r_[rng.integers(2, 60, 500), rng.integers(100, 900, 40), [160, 161, 162]]]
    tokens, seq_len = _long_set(tmp_path, lengths), 160
    alone, packed = Rows(tokens, seq_len, False), Rows(tokens, seq_len, False, block)
    pieces, starts = [], []
    for row in range(len(packed)):
        batch = torch.from_numpy(packed[row])[None]
        numbers = split_documents(batch)[0].tolist()
        found = {}
        for place, token in enumerate(batch[0].tolist()):
            number = numbers[min(place, seq_len - 1)]
            if token != IGNORE:
                found.setdefault(number, []).append(token)
                starts += [place] if len(found[number]) == 1 else []
        pieces += [tuple(piece) for piece in found.values()]
    assert sorted(pieces) == sorted(
        tuple(t for t in alone[i].tolist() if t != IGNORE) for i in range(len(alone))
    )
    assert all(start % block == 0 for start in starts)
    assert packed.padding() == pytest.approx(1 - sum(map(len, pieces)) / (len(packed) * (seq_len + 1)))
    assert packed.padding() < {1: 0.06, 4: 0.1, 7: 0.16, 32: 0.45, 160: 1.0}[block] <= alone.padding() + 0.4
    counts = [Counter(targets_of(rows)) for rows in (alone, packed)]
    assert counts[0] == counts[1]


def targets_of(rows):
    batch = torch.from_numpy(np.stack([rows[i] for i in range(len(rows))]))
    return [t for t in split_batch(batch)[1].ravel().tolist() if t != IGNORE]


def test_packing_is_a_best_fit(tmp_path):
    """By hand: 7 places; with the padding behind them 5 takes 6, 3 takes 4 and 2 takes 3."""
    tokens, _ = document_set(tmp_path, [2, 5, 3, 2, 7])
    rows = Rows(tokens, SEQ, crossing=False, block=1)
    gap = IGNORE
    assert [rows[i].tolist() for i in range(len(rows))] == [
        [201, 202, 0, gap, 1, 0, gap],
        [101, 102, 103, 104, 0, gap, gap],
        [301, 0, gap, gap, gap, gap, gap],
        [401, 402, 403, 404, 405, 406, 0],
    ]


def test_the_first_token_of_a_document_is_no_target():
    batch = torch.tensor([[5, 6, 0, IGNORE, 7, 8, 0], [5, IGNORE, 9, 3, 4, 2, 1]])
    inputs, targets = split_batch(batch)
    assert inputs.tolist() == [[5, 6, 0, 0, 7, 8], [5, 0, 9, 3, 4, 2]]
    assert targets.tolist() == [[6, 0, IGNORE, IGNORE, 8, 0], [IGNORE, IGNORE, 3, 4, 2, 1]]
    assert split_documents(batch).tolist() == [[0, 0, 0, 0, 1, 1], [0, 0, 1, 1, 1, 1]]


def test_padding_is_ignored_and_harmless():
    batch = torch.tensor([[5, 6, 0, IGNORE, IGNORE]])
    inputs, targets = split_batch(batch)
    assert inputs.tolist() == [[5, 6, 0, 0]] and targets.tolist() == [[6, 0, IGNORE, IGNORE]]


def test_a_curriculum_cuts_rows_and_keeps_targets():
    batch = torch.arange(2 * 7).reshape(2, 7)
    rows = cut_rows(batch, 2)
    assert rows.tolist() == [[0, 1, 2], [2, 3, 4], [4, 5, 6], [7, 8, 9], [9, 10, 11], [11, 12, 13]]
    assert sorted(rows[:, 1:].ravel().tolist()) == sorted(batch[:, 1:].ravel().tolist())
    stages = (Stage(until_step=2, seq_len=2), Stage(until_step=3, seq_len=3))
    loader, full = make(LoaderConfig(curriculum=stages)), make()
    shapes = [tuple(next(loader).shape) for _ in range(4)]
    assert shapes == [(36, 3), (36, 3), (24, 4), (12, 7)]
    assert torch.equal(loader.batch(0), cut_rows(full.batch(0), 2))


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: TokenMixture([]), "at least one set"),
        (lambda: TokenMixture([marked(0, 1)], [0.0]), "weights must be positive, one for each of 1 token"),
        (lambda: TokenMixture([marked(0, 1)], [1, 1]), "one for each of 1 token sets, got"),
        (lambda: interleave([1.0] * (PATTERN + 1)), "may have 4096 token sets, got 4097"),
        (lambda: make(tokens=TokenMixture([marked(0, 20), marked(1, 1)[:3]], [1, 1])),
         "token set 1 of the mixture has 3 tokens, no row of seq_len=6"),
        (lambda: LoaderConfig(bucketing=True), "bucketing needs loader.crossing = false"),
        (lambda: LoaderConfig(packing=True), "packing needs loader.crossing = false and loader.bucketing"),
        (lambda: LoaderConfig(crossing=False, packing=True, bucketing=True), "and loader.bucketing = false"),
        (lambda: TokenLoader(marked(0, 61), SEQ, 2, 0, block=4, options=LoaderConfig(
            crossing=False, packing=True, curriculum=(Stage(until_step=5, seq_len=2),))),
         "with packing the seq_len of a stage must be a multiple of 4, got 2"),
        (lambda: LoaderConfig(workers=-1), "loader.workers must be at least 0, got -1"),
        (lambda: LoaderConfig(curriculum=(Stage(until_step=5, seq_len=2), Stage(until_step=5, seq_len=3))),
         r"until_step must grow from 1 on, got \[5, 5\]"),
        (lambda: make(LoaderConfig(curriculum=(Stage(until_step=5, seq_len=4),))),
         "the seq_len of a stage must divide 6, got 4"),
    ],
)  # fmt: skip
def test_bad_settings_are_named(act, message):
    with pytest.raises(ValueError, match=message):
        act()


def test_write_set_is_readable(tmp_path):
    assert len(write_set(tmp_path, [3, 4])) == 7
