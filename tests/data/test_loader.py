"""Batches: every window once per epoch over all ranks, exact resume, fixed validation order."""

import gc
import json
import pickle
import time
from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch

from nested_learning.data import LoaderConfig, TokenLoader, sequential_batches
from nested_learning.data import loader as loader_module

SEQ = 4  # windows of 5 tokens


def windows(count, extra=3):
    """A token array whose window w starts with token 5w, plus a few tokens that make no window."""
    return np.arange(count * (SEQ + 1) + extra, dtype=np.uint16)


def ids(batch):
    """Which windows a batch holds; checks that they are whole and in order inside."""
    first = batch[:, :1]
    assert torch.equal(batch, first + torch.arange(SEQ + 1))
    return (first[:, 0] // (SEQ + 1)).tolist()


def test_batches_are_int64_windows_of_the_array():
    loader = TokenLoader(windows(8), SEQ, 3, seed=0, shuffle=False)
    batch = next(loader)
    assert batch.dtype == torch.int64
    assert batch.tolist() == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11, 12, 13, 14]]


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("shuffle", [True, False])
def test_ranks_use_every_window_once_per_epoch(world_size, shuffle):
    count, batch_size, epochs = 19, 3, 9  # 19 windows: no batch size divides them, so batches cross epochs
    loaders = [
        TokenLoader(windows(count), SEQ, batch_size, 7, shuffle, r, world_size) for r in range(world_size)
    ]
    line = []
    while len(line) < epochs * count:
        step = [ids(next(loader)) for loader in loaders]
        line += [window for rank in step for window in rank]
    for epoch in range(epochs):
        assert sorted(line[epoch * count : (epoch + 1) * count]) == list(range(count))


def test_world_size_does_not_change_the_order():
    single = TokenLoader(windows(20), SEQ, 4, seed=3)
    pair = [TokenLoader(windows(20), SEQ, 2, seed=3, rank=rank, world_size=2) for rank in (0, 1)]
    for _ in range(12):
        assert torch.equal(next(single), torch.cat([next(loader) for loader in pair]))


def test_order_depends_on_seed_and_epoch():
    def epochs(seed):
        loader = TokenLoader(windows(32), SEQ, 32, seed=seed)
        return [tuple(ids(next(loader))) for _ in range(3)]

    assert epochs(0) == epochs(0)
    assert len(set(epochs(0) + epochs(1))) == 6
    assert tuple(range(32)) not in epochs(0)


@pytest.mark.parametrize("steps", [0, 1, 6, 7, 40])
def test_resume_continues_the_uninterrupted_run(steps):
    def make():
        return TokenLoader(windows(19), SEQ, 3, seed=5, rank=1, world_size=2)

    straight, before, after = make(), make(), make()
    expected = list(islice(straight, steps + 15))[steps:]
    for _ in range(steps):
        next(before)
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    assert after.epoch == before.epoch == steps * 6 // 19
    assert torch.equal(torch.stack(list(islice(after, 15))), torch.stack(expected))
    assert after.state_dict() == straight.state_dict()


def test_state_is_the_same_on_every_rank():
    states = []
    for rank in (0, 1):
        loader = TokenLoader(windows(19), SEQ, 3, seed=5, rank=rank, world_size=2)
        states.append([next(loader), loader.state_dict()][1])
    assert states[0] == states[1]


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 4), (4, 1)])
def test_resume_on_another_number_of_ranks(before, after):
    def make(world_size):
        size = 8 // world_size
        return [
            TokenLoader(windows(19), SEQ, size, 5, rank=r, world_size=world_size) for r in range(world_size)
        ]

    def step(loaders):
        return torch.cat([next(loader) for loader in loaders])

    straight, first, second = make(1), make(before), make(after)
    expected = [step(straight) for _ in range(12)]
    assert all(torch.equal(step(first), expected[i]) for i in range(5))
    for loader in second:
        loader.load_state_dict(json.loads(json.dumps(first[-1].state_dict())))
    assert all(torch.equal(step(second), expected[i]) for i in range(5, 12))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seq_len": 5}, "seq_len=4, this loader has seq_len=5"),
        ({"batch_size": 2}, "global_batch=3, this loader has global_batch=2"),
        ({"seed": 1}, "seed=0, this loader has seed=1"),
        ({"shuffle": False}, "shuffle=True, this loader has shuffle=False"),
        ({"world_size": 2}, "global_batch=3, this loader has global_batch=6"),
        ({"tokens": windows(20)}, "num_tokens=98, this loader has num_tokens=103"),
    ],
)
def test_state_of_another_loader_is_refused(change, message):
    settings = {"tokens": windows(19), "seq_len": SEQ, "batch_size": 3, "seed": 0}
    state = TokenLoader(**settings).state_dict()
    with pytest.raises(ValueError, match=message):
        TokenLoader(**(settings | change)).load_state_dict(state)


def test_state_of_another_version_is_refused():
    loader = TokenLoader(windows(19), SEQ, 3, seed=0)
    with pytest.raises(ValueError, match="version=0, this loader has version=4"):
        loader.load_state_dict(loader.state_dict() | {"version": 0})


def test_validation_batches_are_fixed_and_in_order():
    tokens = windows(11)
    batches = [ids(batch) for batch in sequential_batches(tokens, SEQ, 2)]
    assert len(batches) == 5  # the eleventh window makes no full batch
    flat = [window for batch in batches for window in batch]
    assert flat == sorted(flat) and max(Counter(flat).values()) == 1
    assert batches == [ids(batch) for batch in sequential_batches(tokens, SEQ, 2)]
    even = [ids(batch) for batch in sequential_batches(windows(6), SEQ, 2)]
    assert even == [[0, 1], [2, 3], [4, 5]]


def test_capped_validation_is_spread_over_the_data():
    assert [ids(batch) for batch in sequential_batches(windows(100), SEQ, 2, max_batches=2)] == [
        [0, 25],
        [50, 75],
    ]
    assert len(list(sequential_batches(windows(4), SEQ, 2, max_batches=99))) == 2


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: TokenLoader(windows(3), SEQ, 4, 0), "18 tokens make 3 windows of seq_len=4"),
        (lambda: TokenLoader(windows(7), SEQ, 4, 0, world_size=2), "batch_size=4 on world_size=2"),
        (lambda: TokenLoader(windows(7), 0, 4, 0), "seq_len=0 must be at least 1"),
        (lambda: TokenLoader(windows(7), SEQ, 0, 0), "batch_size=0 must be at least 1"),
        (lambda: TokenLoader(windows(7), SEQ, 1, 0, rank=2, world_size=2), "rank=2 must be"),
        (lambda: sequential_batches(windows(1), SEQ, 2), "fewer than one batch"),
        (lambda: sequential_batches(windows(4), SEQ, 2, max_batches=0), "max_batches=0 must be at least 1"),
    ],
)
def test_bad_settings_are_named(act, message):
    with pytest.raises(ValueError, match=message):
        act()


@pytest.fixture
def pinned(monkeypatch):
    """Which batches were pinned, each a copy as on a machine with CUDA; pinning needs a driver."""
    seen = []

    def pin(batch):
        seen.append(batch)
        return batch.clone()

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    yield seen
    gc.collect()  # ends the threads of loaders, which would pin in the next test


def test_batches_that_are_read_ahead_are_the_same(pinned):
    plain, ahead = (TokenLoader(windows(19), SEQ, 3, seed=0, pin_memory=pin) for pin in (False, True))
    for _ in range(9):
        assert torch.equal(next(ahead), next(plain))
        assert ahead.state_dict() == plain.state_dict()  # what was read ahead is not counted
    assert len(pinned) in (9, 10)


def test_the_next_batch_is_read_while_this_one_is_used(pinned):
    loader = TokenLoader(windows(8), SEQ, 2, seed=0, pin_memory=True)
    next(loader)
    for _ in range(500):
        if len(pinned) == 2:
            break
        time.sleep(0.01)
    assert len(pinned) == 2  # and not a third one


def test_a_pinned_loader_resumes_in_the_middle_and_moves_back(pinned):
    made = (windows(19), SEQ, 3, 0)
    loader = TokenLoader(*made, pin_memory=True)
    first = [next(loader) for _ in range(4)]
    state = loader.state_dict()
    after = [next(loader) for _ in range(4)]
    resumed = TokenLoader(*made, pin_memory=True)
    resumed.load_state_dict(state)
    loader.load_state_dict(state)  # with a batch read ahead, which is dropped
    for batch in after:
        assert torch.equal(next(resumed), batch) and torch.equal(next(loader), batch)
    assert not torch.equal(first[-1], after[-1])
    assert torch.equal(next(pickle.loads(pickle.dumps(loader))), next(resumed))


def test_an_error_of_the_thread_is_raised_and_no_end_of_the_data(pinned):
    loader = TokenLoader(windows(8), SEQ, 2, seed=0, pin_memory=True)
    whole = loader.batch

    def broken(step):
        if step == 2:
            raise OSError("a shard is gone")
        return whole(step)

    loader.batch = broken
    next(loader), next(loader)
    for _ in range(2):
        with pytest.raises(OSError, match="a shard is gone"):
            next(loader)
    loader.batch = whole
    assert torch.equal(next(loader), whole(2))


def test_memory_is_pinned_for_cuda_only(monkeypatch):
    """Also with workers: a run on the CPU of a machine with a card pins nothing."""

    def pinned(loader):
        raise AssertionError("a batch is pinned")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(TokenLoader, "_pinned", pinned)
    next(TokenLoader(windows(8), SEQ, 2, seed=0))
    with pytest.raises(AssertionError, match="is pinned"):
        next(TokenLoader(windows(8), SEQ, 2, seed=0, pin_memory=True))
    for pin in (False, True):
        made = TokenLoader(windows(8), SEQ, 2, 0, options=LoaderConfig(workers=1), pin_memory=pin)
        assert loader_module._read_ahead(made, 0).pin_memory is pin
