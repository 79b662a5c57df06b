"""A level that moves every fifth step: the same run on every strategy, also from one to another."""

import os
import signal

import pytest
from ranks import run_ranks
from work import losses, tiny_overrides, train

from nested_learning.train.checkpoint import find_checkpoint, read_checkpoint

pytestmark = pytest.mark.slow
SLOW = {"levels": "cms_slow", "model.levels.2.chunk_size": 80}


def stop_at_seven(overrides, strategy):
    from nested_learning.train.trainer import Trainer

    original = Trainer.update

    def update(self, tokens):
        if self.step == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, tokens)

    Trainer.update = update
    return train(overrides, strategy)


@pytest.mark.parametrize("before, after", [(("ddp", 2), ("fsdp", 2)), (("fsdp", 2), ("single", 1))])
def test_a_window_goes_on_under_another_strategy(tmp_path, before, after):
    run_ranks(1, tmp_path, train, tiny_overrides(tmp_path, "whole", **SLOW), "single")
    overrides = tiny_overrides(tmp_path, "part", **SLOW)
    assert run_ranks(before[1], tmp_path, stop_at_seven, overrides, before[0]) == [7] * before[1]
    assert set(run_ranks(after[1], tmp_path, train, overrides, after[0])) == {12}
    whole, part = losses(tmp_path / "whole"), losses(tmp_path / "part")
    assert list(part) == list(range(1, 13))
    assert [part[i] for i in part] == pytest.approx([whole[i] for i in part], rel=1e-5)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_resumed_in_mid_window_equals_uninterrupted_bit_for_bit(tmp_path, strategy):
    run_ranks(2, tmp_path, train, tiny_overrides(tmp_path, "whole", **SLOW), strategy)
    overrides = tiny_overrides(tmp_path, "part", **SLOW)
    run_ranks(2, tmp_path, stop_at_seven, overrides, strategy)
    run_ranks(2, tmp_path, train, overrides, strategy)
    assert losses(tmp_path / "part") == losses(tmp_path / "whole")
    a, b = (read_checkpoint(find_checkpoint(tmp_path / name))["model"] for name in ("whole", "part"))
    assert all((a[name] == b[name]).all() for name in a)
