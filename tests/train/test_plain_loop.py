"""The plain loop against one written out by hand."""

from __future__ import annotations

import itertools
import math
import statistics

import pytest
import torch
from torch import Tensor, nn

from nested_learning.optim.config import OptimConfig
from nested_learning.train.plain_loop import Loop, train_steps

OPTIM = OptimConfig(name="sgd", lr=0.5, momentum=0.0, weight_decay=0.0, schedule="constant", warmup_steps=2)


class Table(nn.Module):
    """Logits of the next token by token."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.linspace(-1, 1, 9).view(3, 3))

    def forward(self, tokens: Tensor) -> tuple[Tensor, None]:
        return self.logits[tokens], None


def batches():
    generator = torch.Generator().manual_seed(0)
    while True:
        tokens = torch.randint(3, (4, 6), generator=generator)
        yield tokens[:, :-1], tokens[:, 1:]


def test_losses_norms_and_parameters_equal_a_loop_by_hand() -> None:
    model, ticks = Table(), []
    loop = Loop(steps=5, eval_every=2)
    history = train_steps(model, batches(), OPTIM, loop, lambda m: float(m.logits[0, 0]), ticks.append)

    weights = torch.linspace(-1, 1, 9).view(3, 3).requires_grad_()
    losses, norms, seen = [], [], []
    for step, (inputs, targets) in zip(range(5), batches(), strict=False):
        loss = -weights[inputs].log_softmax(-1).gather(-1, targets[..., None]).mean()
        (gradient,) = torch.autograd.grad(loss, weights)
        norm = gradient.norm()
        with torch.no_grad():
            weights -= 0.5 * min(1.0, (step + 1) / 2) * gradient * min(1.0, 1.0 / float(norm))
        losses.append(loss.item())
        norms.append(float(norm))
        seen.append(weights[0, 0].item())
    assert history.losses == pytest.approx(losses, rel=1e-5)
    assert history.norms == pytest.approx(norms, rel=1e-5)
    assert [step for step, _ in history.curve] == [2, 4, 5]
    assert [value for _, value in history.curve] == pytest.approx([seen[1], seen[3], seen[4]], rel=1e-5)
    assert history.nonfinite == 0 and sum(ticks) == 5
    result = history.to_result()
    assert result["max_norm"] == max(history.norms)
    assert result["median_norm"] == statistics.median(history.norms)


def test_stops_at_a_value_and_ticks_the_steps_that_are_left() -> None:
    values, ticks = iter([0.2, 0.9, 0.5]), []
    loop = Loop(steps=10, eval_every=3, stop_at=0.9)
    history = train_steps(Table(), batches(), OPTIM, loop, lambda m: next(values), ticks.append)
    assert history.curve == [(3, 0.2), (6, 0.9)]
    assert len(history.losses) == 6 and sum(ticks) == 10


class Spoiled(Table):
    """A table whose answer to the third batch is not a number."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = itertools.count(1)

    def forward(self, tokens: Tensor) -> tuple[Tensor, None]:
        return self.logits[tokens] * (math.nan if next(self.calls) == 3 else 1.0), None


def test_a_step_that_is_not_finite_is_counted_and_changes_nothing() -> None:
    model, seen = Spoiled(), []

    def evaluate(m: nn.Module) -> float:
        seen.append(m.logits.clone())
        return 0.0

    history = train_steps(model, batches(), OPTIM, Loop(steps=4, eval_every=1), evaluate, lambda n: None)
    assert history.nonfinite == 1
    assert torch.equal(seen[1], seen[2]) and not torch.equal(seen[2], seen[3])
    result = history.to_result()
    assert [loss is None for loss in result["losses"]] == [False, False, True, False]
    assert result["max_norm"] is not None and math.isfinite(result["max_norm"])


def test_loop_refuses_no_steps() -> None:
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        Loop(steps=0, eval_every=1)
