"""Runs that are killed and go on: same losses on the same ranks, same samples on others."""

import os
import random
import time

import pytest
import torch
from ranks import Ranks, run_ranks
from work import config_of, losses, tiny_overrides, train

from nested_learning.train.checkpoint import find_checkpoint, load_checkpoint, read_checkpoint, verify
from nested_learning.train.compiling import settle

KINDS = [("single", 1), ("ddp", 2), ("fsdp", 2)]


def kill_often(folder, name, strategy, count, kills, **more):
    """Run `name` to its end through `kills` SIGKILLs of all its processes at random moments."""
    overrides, run_dir = tiny_overrides(folder, name, **more), folder / name
    rng = random.Random(name)
    done = 0
    while done < kills:
        ranks = Ranks(count, folder, train, overrides, strategy)
        reached = len(losses(run_dir))
        deadline = time.monotonic() + 120
        while len(losses(run_dir)) == reached and ranks.processes[0].is_alive():  # at least one step
            assert time.monotonic() < deadline, ranks.output
            time.sleep(0.002)
        time.sleep(rng.random() * 0.3)
        ranks.kill()
        codes = ranks.join()
        done += 1
        assert set(codes) <= {-9, 0}, ranks.output
        if (run_dir / "checkpoints" / "index.json").exists():
            assert verify(find_checkpoint(run_dir)) == []
    run_ranks(count, folder, train, overrides, strategy)


def compare(folder, strategy, count, kills, **more):
    run_ranks(count, folder, train, tiny_overrides(folder, "whole", **more), strategy)
    kill_often(folder, "part", strategy, count, kills, **more)
    whole = losses(folder / "whole")
    assert list(losses(folder / "part")) == list(whole)
    assert losses(folder / "part") == whole  # bit for bit: a skipped or repeated sample would show
    a, b = read_checkpoint(folder / "whole")["model"], read_checkpoint(folder / "part")["model"]
    assert all((a[name] == b[name]).all() for name in a)


@pytest.mark.parametrize("strategy, count", KINDS)
def test_killed_and_resumed_equals_uninterrupted(tmp_path, strategy, count):
    more = {"train.steps": 24, "train.save_every": 3, "train.eval_every": 24}
    compare(tmp_path, strategy, count, 3 if count == 1 else 2, **more)


@pytest.mark.slow
@pytest.mark.parametrize("background", ["false", "true"])
@pytest.mark.parametrize("strategy, count", KINDS)
def test_twenty_kills(tmp_path, strategy, count, background):
    more = {"train.steps": 400, "train.save_every": 3, "parallel.async_save": background}
    compare(tmp_path, strategy, count, 20, **more)


def start_with(folder, strategy, count):
    """Six of twelve steps, in `folder/strategy`."""
    overrides = tiny_overrides(folder, strategy)
    run_ranks(count, folder, stop_at_six, overrides, strategy)
    return folder / strategy


def stop_at_six(overrides, strategy):
    import signal

    from nested_learning.train.trainer import Trainer

    original = Trainer.update

    def update(self, tokens):
        if self.step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, tokens)

    Trainer.update = update
    return train(overrides, strategy)


@pytest.mark.parametrize("before, after", [(("fsdp", 2), ("single", 1)), (("ddp", 2), ("fsdp", 4))])
def test_another_number_of_ranks_goes_on_with_the_next_samples(tmp_path, before, after):
    run_ranks(1, tmp_path, train, tiny_overrides(tmp_path, "whole"), "single")
    run_dir = start_with(tmp_path, *before)
    assert max(losses(run_dir)) == 6
    run_ranks(after[1], tmp_path, train, tiny_overrides(tmp_path, before[0]), after[0])
    whole, part = losses(tmp_path / "whole"), losses(run_dir)
    assert list(part) == list(range(1, 13))
    assert [part[i] for i in part] == pytest.approx([whole[i] for i in part], rel=1e-5)
    model, tokenizer, config = load_checkpoint(run_dir)
    asked = config_of(tiny_overrides(tmp_path, before[0]))
    assert config == settle(asked, torch.device("cpu")) and tokenizer.vocab_size == 257


def test_every_window_once_when_the_number_of_ranks_changes():
    import numpy as np

    from nested_learning.data.loader import TokenLoader

    tokens = np.arange(24 * 5, dtype=np.uint16)  # 24 windows of 4 + 1; a global batch is 4

    def take(world, steps, state=None):
        loaders = [TokenLoader(tokens, 4, 4 // world, 0, rank=r, world_size=world) for r in range(world)]
        if state is not None:
            for loader in loaders:
                loader.load_state_dict(state)
        rows = [int(row[0]) for _ in range(steps) for loader in loaders for row in next(loader)]
        return rows, loaders[0].state_dict()

    first, state = take(2, 2)
    second, state = take(1, 3, state)
    third, _ = take(4, 1, state)
    assert sorted(first + second + third) == list(range(0, 120, 5))
    assert first + second + third == take(1, 6)[0]


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A folder with the run "old", the overrides of one that begins with it, and that run's losses."""
    folder = tmp_path_factory.mktemp("begun")
    train(tiny_overrides(folder, "old", **{"train.steps": 4}), "single")
    other = {"train.init_from": folder / "old", "optim.lr": 1e-3, "seed": 1, "train.steps": 6}
    train(tiny_overrides(folder, "one", **other), "single")
    return folder, other, losses(folder / "one")


@pytest.mark.parametrize("strategy", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp"])
def test_several_ranks_begin_with_a_checkpoint_as_one_does(begun, strategy):
    folder, other, one = begun
    run_ranks(2, folder, train, tiny_overrides(folder, strategy, **other), strategy)
    two = losses(folder / strategy)
    assert one[1] < losses(folder / "old")[2]  # it has learned before
    assert [two[i] for i in two] == pytest.approx([one[i] for i in one], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_several_ranks_go_on_with_another_rate(tmp_path, strategy):
    first = {"train.steps": 4, "optim.schedule": "constant"}
    changed = {**first, "train.steps": 8, "optim.lr": 1e-4, "optim.weight_decay": 0.5}
    changed["train.resume_with"] = "[optim.lr,optim.weight_decay]"
    for settings in (first, changed):
        train(tiny_overrides(tmp_path, "one", **settings), "single")
        run_ranks(2, tmp_path, train, tiny_overrides(tmp_path, "two", **settings), strategy)
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert list(two) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [two[i] for i in two] == pytest.approx([one[i] for i in one], rel=1e-5)
    groups = read_checkpoint(tmp_path / "two")["optimizer"]["groups"]
    assert {group["weight_decay"] for group in groups} == {0.0, 0.5}
