"""Signals in a validation, SIGHUP, and weights that are not worth saving."""

import contextlib
import os
import signal

import pytest
import torch
from test_trainer import rows, same_weights

from nested_learning.train.checkpoint import read_checkpoint
from nested_learning.train.guard import NonFiniteError, first_nonfinite
from nested_learning.train.progress import Progress, StopSignals


def interrupt_validation(trainer, step, batch):
    """A SIGINT while the given batch of the validation after `step` is computed; the batches of it."""
    seen = []

    def look(*args):
        if trainer.step == step and not trainer.model.training:
            seen.append(len(seen) + 1)
            if len(seen) == batch:
                signal.raise_signal(signal.SIGINT)

    trainer.model.head.register_forward_hook(look)
    return seen


@pytest.mark.parametrize("step, save_every", [(4, 3), (4, 4), (8, 3)])
def test_a_stop_in_a_validation_is_at_once_and_goes_on_bit_for_bit(make_trainer, step, save_every):
    options = {"eval_batches": None, "save_every": save_every, "keep_last": 9}
    whole = make_trainer("whole", **options)
    expected = whole.fit()
    part = make_trainer("part", **options)
    seen = interrupt_validation(part, step, batch=2)
    result = part.fit()
    assert seen == [1, 2] and len(part.corpus.valid) > 5 * 4 * 13  # there were more
    assert result.interrupted and result.step == step and part.model.training
    assert [row["step"] for row in rows(part) if "valid_loss" in row] == [s for s in (4, 8) if s < step]
    resumed = make_trainer("part", resume=part.store.latest(), **options)
    again = resumed.fit()
    assert not again.interrupted
    assert (again.valid_loss, again.bits_per_byte) == (expected.valid_loss, expected.bits_per_byte)
    assert same_weights(whole.model, resumed.model)
    assert rows(resumed) == rows(whole)
    for trainer in (whole, resumed):
        assert trainer.store.best().name == "step_00000008"
        if save_every == 4:
            saved = read_checkpoint(trainer.config.run_dir / "checkpoints" / "step_00000004")
            assert saved["metrics"]["step"] == 4
    names = [[path.name for path in trainer.store.folders()] for trainer in (whole, resumed)]
    assert set(names[0]) <= set(names[1])


def test_a_closed_terminal_finishes_the_step_and_saves(make_trainer):
    trainer = make_trainer(save_every=100)
    handler = signal.getsignal(signal.SIGHUP)
    trainer.model.head.register_forward_hook(
        lambda *args: (
            signal.raise_signal(signal.SIGHUP) if trainer.step == 4 and trainer.model.training else None
        )
    )
    result = trainer.fit()
    assert result.interrupted and result.step == 5
    assert trainer.store.latest().name == "step_00000005"
    assert signal.getsignal(signal.SIGHUP) == handler


def test_a_signal_that_is_ignored_stays_ignored():
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            signal.raise_signal(signal.SIGHUP)
        assert signals.received is None and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, former)


def test_a_bar_without_its_terminal_goes_silent(monkeypatch):
    ours, theirs = os.openpty()
    terminal = os.fdopen(theirs, "w", buffering=1)
    monkeypatch.setattr("sys.stderr", terminal)
    progress = Progress(10, 0, shown=True)
    terminal.flush()
    os.close(ours)
    with pytest.raises(OSError, match="Input/output error"):
        os.write(theirs, b"x")
    for step in range(1, 11):
        progress.reach(step)
    progress.print("a line")
    progress.show({"loss": 1.0, "tokens_per_second": 1.0, "memory_gib": 1.0})
    progress.close()
    assert progress.bar.disable
    with contextlib.suppress(OSError):
        terminal.close()


def test_the_bar_moves_within_a_step(make_trainer, monkeypatch):
    reached = []
    monkeypatch.setattr(Progress, "reach", lambda self, steps: reached.append(steps))
    make_trainer(steps=2, batch_size=4, accumulation=4).fit()
    assert reached == [0.25, 0.5, 0.75, 1, 1, 1.25, 1.5, 1.75, 2, 2]


HUGE = "the validation loss is inf"  # of weights that are finite, but not much less than infinite
BROKEN = "the first tensor that is not finite after the update is model tensor 'embedding.weight'"


@pytest.mark.parametrize(
    "lr, weight_decay, eval_every, cause",
    [(1e38, 0.1, 4, HUGE), (1e-2, float("inf"), 4, BROKEN), (1e-2, float("inf"), 8, BROKEN)],
)
def test_weights_that_the_last_update_broke_are_not_saved(make_trainer, lr, weight_decay, eval_every, cause):
    trainer = make_trainer(save_every=2, eval_every=eval_every)
    update = trainer.update

    def break_at_four(tokens):
        if trainer.step == 3:
            trainer.config.optim.lr = lr
            for group in trainer.optimizer.param_groups:
                group["weight_decay"] = weight_decay
        return update(tokens)

    trainer.update = break_at_four
    with pytest.raises(NonFiniteError, match=f"step 4: {cause}; .*step_00000002"):
        trainer.fit()
    assert [path.name for path in trainer.store.folders()] == ["step_00000002"]
    resumed = make_trainer(save_every=2, resume=trainer.store.latest())
    assert resumed.fit().step == 8


def test_optimizer_state_that_is_not_finite_is_not_saved(make_trainer):
    trainer = make_trainer()
    trainer.update(next(trainer.loader))
    state = trainer.optimizer.state[trainer.model.head.bias]
    state["exp_avg_sq"][5] = float("inf")
    with pytest.raises(NonFiniteError, match="step 1: .* is optimizer tensor 'head.bias/exp_avg_sq'"):
        trainer.save()
    assert trainer.store.latest() is None


def test_the_first_bad_tensor_is_named():
    good, counts, empty = torch.ones(3), torch.tensor([1, 2]), torch.ones(0)
    bad = torch.tensor([1.0, float("nan")], dtype=torch.bfloat16)
    worse = torch.tensor([float("-inf"), 1.0], dtype=torch.float64)
    named = [("a", good), ("b", counts), ("c", empty)]
    assert first_nonfinite(named) is None
    assert first_nonfinite([*named, ("d", bad), ("e", worse)]) == "d"
    assert first_nonfinite([*named, ("e", worse)]) == "e"
    assert first_nonfinite([("big", torch.full((4,), 3e38))]) is None
    assert first_nonfinite([]) is None
