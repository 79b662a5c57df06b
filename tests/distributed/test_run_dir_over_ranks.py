"""What one rank finds, all ranks hear: a directory in use, bad shards, a stop in a validation."""

import fcntl
import os
import signal
import termios
import time

import pytest
import torch
from ranks import Ranks, run_ranks
from work import losses, tiny_overrides, train

from nested_learning.lock import locked
from nested_learning.train.checkpoint import find_checkpoint, read_checkpoint


def error_of(overrides, strategy):
    try:
        train(overrides, strategy)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def test_a_directory_in_use_is_refused_on_all_ranks(tmp_path):
    with locked(tmp_path / "run" / ".lock", "it"):
        errors = run_ranks(2, tmp_path, error_of, tiny_overrides(tmp_path, "run"), "ddp")
    assert errors[0] == errors[1]
    assert errors[0].startswith(
        f"InUseError: run directory {tmp_path}/run is in use by process {os.getpid()} on"
    )
    assert not list((tmp_path / "run").iterdir())


def break_a_shard(overrides, strategy):
    """From step 6 on, rank 1's part of a weight is not finite after the update."""
    from nested_learning.train.trainer import Trainer

    original = Trainer.update

    def update(self, tokens):
        result = original(self, tokens)
        if self.step == 8 and self.strategy.rank == 1:
            with torch.no_grad():
                self.model.get_parameter("norm.weight").to_local()[-1] = torch.nan
        return result

    Trainer.update = update
    return error_of(overrides, strategy)


def test_a_bad_shard_is_saved_by_no_rank(tmp_path):
    overrides = tiny_overrides(tmp_path, "run", **{"train.eval_every": 12})
    errors = run_ranks(2, tmp_path, break_a_shard, overrides, "fsdp")
    assert errors[0] == errors[1]
    assert errors[0].startswith(
        "NonFiniteError: step 8: the first tensor that is not finite after the update"
    )
    assert "model tensor 'norm.weight'" in errors[0] and "step_00000004" in errors[0]
    assert find_checkpoint(tmp_path / "run").name == "step_00000004"


def stop_in_validation(overrides, strategy):
    """Rank 1 gets a SIGTERM in the first batch of the validation at step 6; batches that this rank saw."""
    from nested_learning.train.trainer import Trainer

    original, seen = Trainer._loss, []

    def loss(self, *arguments, **more):
        if self.step == 6 and not self.model.training:
            seen.append(1)
            if self.strategy.rank == 1:
                signal.raise_signal(signal.SIGTERM)
        return original(self, *arguments, **more)

    Trainer._loss = loss
    assert train(overrides, strategy) == 6
    return len(seen)


def test_all_ranks_leave_a_validation_together(tmp_path):
    overrides = tiny_overrides(tmp_path, "run", **{"train.eval_batches": "null"})
    assert run_ranks(2, tmp_path, stop_in_validation, overrides, "ddp") == [1, 1]
    assert losses(tmp_path / "run", "valid_loss") == {}
    run_ranks(2, tmp_path, train, overrides, "ddp")
    run_ranks(2, tmp_path, train, [*overrides, "name=whole"], "ddp")
    for key in ("loss", "valid_loss"):
        assert losses(tmp_path / "run", key) == losses(tmp_path / "whole", key)
    a, b = read_checkpoint(tmp_path / "run")["model"], read_checkpoint(tmp_path / "whole")["model"]
    assert all(torch.equal(a[name], b[name]) for name in a)


def train_in_terminal(overrides, terminal):
    os.setsid()
    descriptor = os.open(terminal, os.O_RDWR)
    fcntl.ioctl(descriptor, termios.TIOCSCTTY, 0)
    for standard in (0, 1, 2):
        os.dup2(descriptor, standard)
    return train(overrides, "single")


@pytest.mark.parametrize("progress", ["true", "false"])
def test_a_run_whose_terminal_closes_saves_and_ends_with_0(tmp_path, progress):
    ours, theirs = os.openpty()
    endless = {
        "train.compile": "false",
        "train.steps": 100_000,
        "train.save_every": 100_000,
        "train.eval_every": 100_000,
    }
    overrides = tiny_overrides(tmp_path, "run", **endless, **{"logging.progress": progress})
    ranks = Ranks(1, tmp_path, train_in_terminal, overrides, os.ttyname(theirs))
    os.close(theirs)
    deadline = time.monotonic() + 120
    os.set_blocking(ours, False)
    while len(losses(tmp_path / "run")) < 3:
        assert ranks.processes[0].is_alive() and time.monotonic() < deadline
        try:
            os.read(ours, 65536)
        except (BlockingIOError, OSError):
            time.sleep(0.01)
    os.close(ours)
    step = ranks.receive(0)
    assert ranks.join() == [0]
    assert read_checkpoint(tmp_path / "run")["step"] == step >= 3
