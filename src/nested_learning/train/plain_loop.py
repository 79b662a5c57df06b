"""A plain training loop for experiments that take minutes, without checkpoints, ranks or log files.

It runs on the CPU, or on the CUDA device that `use_device` names, there with every step as one CUDA graph;
with parts of the model compiled, if that was asked for.

Shapes: a batch is `inputs [B, T]` and `targets [B, T]`, int64; a target of -100 is not counted.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from nested_learning.models.compile import compile_model
from nested_learning.models.lm import HopeLM
from nested_learning.optim.build import build_optimizer, lr_at
from nested_learning.optim.config import OptimConfig
from nested_learning.train.captured import CapturedForward, CapturedStep
from nested_learning.train.objective import next_token_loss
from nested_learning.train.trainer import slow_levels

Batch = tuple[Tensor, Tensor]
Step = Callable[[Batch], Tensor]

_device, _compiled = torch.device("cpu"), False


def use_device(device: torch.device, compiled: bool = False) -> None:
    """Train on `device` from now on in this process; `compiled`: with what `compile_model` compiles."""
    global _device, _compiled
    _device, _compiled = device, compiled


def used_device() -> torch.device:
    """Where this process trains."""
    return _device


def device_of(model: nn.Module) -> torch.device:
    """Where the parameters of `model` are."""
    return next(model.parameters()).device


@dataclass(kw_only=True, slots=True)
class Loop:
    """How long to train and when to evaluate.

    Args:
        steps: largest number of updates.
        eval_every: steps between two evaluations; the last step is always evaluated.
        stop_at: stop as soon as an evaluation gives at least this; None = never.
    """

    steps: int
    eval_every: int
    stop_at: float | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "eval_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(slots=True)
class History:
    """Loss, norm of the gradients (before clipping) and seconds of steps; `(step, value)` of evaluations."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    curve: list[tuple[int, float]] = field(default_factory=list)
    nonfinite: int = 0
    seconds: float = 0.0

    def to_result(self) -> dict[str, Any]:
        """The history as plain values for JSON; a number that is not finite becomes None."""
        finite = [norm for norm in self.norms if math.isfinite(norm)]
        return {
            "steps": len(self.losses),
            "nonfinite": self.nonfinite,
            "max_norm": max(finite, default=None),
            "median_norm": statistics.median(finite) if finite else None,
            "seconds": round(self.seconds, 1),
            "step_seconds": statistics.median(self.step_seconds) if self.step_seconds else None,
            "losses": [finite_or_none(loss) for loss in self.losses],
            "norms": [finite_or_none(norm) for norm in self.norms],
            "curve": [(step, finite_or_none(value)) for step, value in self.curve],
        }


def train_steps(
    model: nn.Module,
    batches: Iterator[Batch],
    optim: OptimConfig,
    loop: Loop,
    evaluate: Callable[[nn.Module], float],
    tick: Callable[[int], object],
    penalty: Callable[[nn.Module], Tensor] | None = None,
) -> History:
    """Train `logits, state = model(inputs)` on `batches`; slow levels of a `HopeLM` at their own pace.

    A step whose loss or gradient norm is not finite is counted and does not change the parameters.

    Args:
        evaluate: returns the number to follow from the model, or from a module with the same forward pass;
            it is called without gradients.
        tick: called with the number of steps that are done or no longer needed.
        penalty: returns a scalar that is added to the loss, such as elastic weight consolidation.
    """
    model.to(_device)
    if _compiled:
        compile_model(model)
    slow = slow_levels(model.config, model) if isinstance(model, HopeLM) else None
    optimizer = build_optimizer(optim, model, slow)
    history, start = History(), time.perf_counter()
    batch = next(batches)
    backward, asked = _step(model, batch, penalty), _forward(model)
    for step in range(loop.steps):
        for group in optimizer.param_groups:
            group["lr"] = lr_at(optim, step, loop.steps)
        batch, began = batch if step == 0 else next(batches), time.perf_counter()
        _update(model, backward(batch), optimizer, optim.clip_norm, history)
        history.step_seconds.append(time.perf_counter() - began)
        tick(1)
        if (step + 1) % loop.eval_every == 0 or step + 1 == loop.steps:
            with torch.no_grad():
                history.curve.append((step + 1, evaluate(asked)))
            if loop.stop_at is not None and history.curve[-1][1] >= loop.stop_at:
                tick(loop.steps - step - 1)
                break
    history.seconds = time.perf_counter() - start
    return history


def _step(model: nn.Module, example: Batch, penalty: Callable[[nn.Module], Tensor] | None) -> Step:
    """The loss of a batch, and its gradients in the parameters."""

    def loss(inputs: Tensor, targets: Tensor) -> Tensor:
        value = next_token_loss(model(inputs)[0], targets)
        return value if penalty is None else value + penalty(model)

    def step(batch: Batch) -> Tensor:
        model.zero_grad(set_to_none=True)
        value = loss(*batch)
        value.backward()  # type: ignore[no-untyped-call]
        return value

    return CapturedStep(model, loss, example) if device_of(model).type == "cuda" else step


def _forward(model: nn.Module) -> nn.Module:
    """The model as evaluations see it."""
    return CapturedForward(model) if device_of(model).type == "cuda" else model


def _update(
    model: nn.Module,
    loss: Tensor,
    optimizer: torch.optim.Optimizer,
    clip_norm: float | None,
    history: History,
) -> None:
    norm = float(clip_grad_norm_(model.parameters(), clip_norm if clip_norm is not None else math.inf))
    history.losses.append(loss.item())  # every step is reported here: an experiment, not the trainer
    history.norms.append(norm)
    if math.isfinite(history.losses[-1]) and math.isfinite(norm):
        optimizer.step()
    else:
        history.nonfinite += 1


def finite_or_none(value: float) -> float | None:
    """`value`, or None if it is NaN or infinite."""
    return value if math.isfinite(value) else None
