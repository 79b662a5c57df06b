"""Levels that the outer optimizer updates at their own frequency (Eq. 71 with optimizer steps for tokens)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from nested_learning.levels import ChunkedUpdateScheduler
from nested_learning.optim.base import is_rehearsal, run_closure, wide_zeros
from nested_learning.optim.delta_gd import InputAware
from nested_learning.optim.wrapper import OptimizerWrapper


class MultiFrequencyOptimizer(OptimizerWrapper):
    """Wraps any optimizer: a level with period C is updated at steps C, 2C, … only.

    Use it like the optimizer inside: `zero_grad`, `backward`, clip, `step`. `.grad` is always the gradient
    of this step; what a level has gathered since its last update is kept here, so clipping limits each
    step's own contribution. Between its updates nothing of a level moves: no weight decay, no moments.
    What the inner optimizer keeps is there from the first step on, also of levels that have not been due yet,
    so that checkpoints always have the same entries.
    An update uses the *sum* of the gathered gradients and a learning rate of `lr / C`: the sum is that of
    Eq. 71, and with SGD both together make the level as fast as one that moves at every step. (Adam's step
    does not depend on the gradient's size; there the level becomes C times slower per update.)

    Args:
        optimizer: see `OptimizerWrapper`. Its parameters outside of all levels are updated at every step.
        periods: name of a level → steps between two of its updates.
        levels: name of a level → its parameters; the same names.
        scale_lr: divide a level's learning rate by its period.
        average: use the mean of the gathered gradients in place of their sum.

    Raises:
        ValueError: names that differ, an optimizer that looks at the inputs of one step, and see
            `ChunkedUpdateScheduler` and `OptimizerWrapper`.

    Example:
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        >>> optimizer = MultiFrequencyOptimizer(optimizer, {"slow": 16}, {"slow": model.mlp.parameters()})
    """

    keys = ("accumulated", "gathered", "updates")
    """Sum of the gradients since the last update and their number, of slow levels; updates made, of all."""

    def __init__(
        self,
        optimizer: Optimizer,
        periods: Mapping[str, int],
        levels: Mapping[str, Iterable[Tensor]],
        *,
        scale_lr: bool = True,
        average: bool = False,
    ) -> None:
        self.scheduler = ChunkedUpdateScheduler(periods)
        if set(periods) != set(levels):
            raise ValueError(
                f"periods and levels must have the same names, got {list(periods)} and {list(levels)}"
            )
        if _looks_at_inputs(optimizer):
            raise ValueError("an optimizer that looks at the inputs of one step cannot update slow levels")
        super().__init__(optimizer, levels)
        self.scale_lr, self.average = scale_lr, average
        for name, period in periods.items():
            for group in self.groups_of(name):
                group["period"] = period
        self._set_clock(0)

    @property
    def steps(self) -> int:
        """Number of steps made."""
        return int(self.param_groups[0]["clock"])

    def statistics(self) -> dict[str, dict[str, int]]:
        """Per level: `period`, number of `updates`, step of the `last_update`."""
        return self.scheduler.statistics()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the levels that are due, and all parameters outside of levels.

        Gradients are kept in float32 at least. Nothing is read from the device.

        Returns:
            The value of `closure`, which is called first; None without one.
        """
        loss = run_closure(closure)
        if is_rehearsal(self):
            self._hold_places([p for p in _parameters(self.param_groups) if p.grad is not None])
            return loss
        step = self.steps + 1
        due = self.scheduler.due(step)
        slow = self._slow_groups()
        self._hold_places([p for p in _parameters(slow) if p.grad is not None and not self.state[p]])
        own = [(p, p.grad) for p in _parameters(slow)]
        rates = [group["lr"] for group in slow]
        for group in slow:
            self._gather(group, group["level"] in due)
            if self.scale_lr:
                group["lr"] = group["lr"] / _period(group)
        try:
            self._update()
        finally:
            for group, rate in zip(slow, rates, strict=True):
                group["lr"] = rate
            for parameter, gradient in own:
                parameter.grad = gradient
        for name in due:
            self.scheduler.mark_updated(name, step)
        self._set_clock(step)
        return loss

    def _hold_places(self, parameters: list[Tensor]) -> None:
        """Make the inner optimizer create the state of `parameters` before their first update.

        As in `torch.distributed.checkpoint`, by a step with zero gradients and learning rates. Its counters
        and momenta may not be those of a fresh parameter, so the first update starts without it.
        """
        if not parameters:
            return
        grads = [(p, p.grad) for p in _parameters(self.param_groups)]
        rates = [group["lr"] for group in self.param_groups]
        for p, _ in grads:
            p.grad = None
        for p in parameters:
            p.grad = torch.zeros_like(p)
        for group in self.param_groups:
            group["lr"] = group["lr"] * 0
        try:
            self._step_inner()
        finally:
            for group, rate in zip(self.param_groups, rates, strict=True):
                group["lr"] = rate
            for p, grad in grads:
                p.grad = grad
        slow = set(_parameters(self._slow_groups()))
        for p in parameters:
            gathering = {"accumulated": wide_zeros(p), "gathered": 0} if p in slow else {}
            self.state[p].update({**gathering, "updates": 0})

    def _gather(self, group: dict[str, Any], due: bool) -> None:
        """Add this step's gradients to the stored ones; give the inner optimizer their sum if `due`, else
        None."""
        found: Tensor | None = getattr(self, "found_inf", None)
        for p in group["params"]:
            state = self.state[p]
            if p.grad is not None:
                grad = p.grad if found is None else torch.where(found.bool(), 0, p.grad)
                state["accumulated"].add_(grad)
                state["gathered"] += 1
            p.grad = None
            if due and state.get("gathered"):
                total = state["accumulated"] / _period(group) if self.average else state["accumulated"]
                p.grad = total.to(p.dtype)

    def _update(self) -> None:
        """Step the inner optimizer on the parameters that have gradients, and clear what they gathered."""
        moving = [p for p in _parameters(self.param_groups) if p.grad is not None]
        for p in moving:
            state = self.state[p]
            if state.get("updates") == 0:
                self.state[p] = self._take_own(state)
        self._step_inner()
        for p in moving:
            state = self.state[p]
            state["updates"] = state.get("updates", 0) + 1
            if "accumulated" in state:
                state["accumulated"].zero_()
                state["gathered"] = 0

    def _slow_groups(self) -> list[dict[str, Any]]:
        return [group for group in self.param_groups if _period(group) > 1]

    def _set_clock(self, step: int) -> None:
        """Store the number of steps in the groups, so that every way to save an optimizer saves it."""
        for group in self.param_groups:
            group["clock"] = step

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the inner optimizer: its parameters are updated at every step."""
        super().add_param_group(param_group)
        if hasattr(self, "optimizer"):
            self._set_clock(self.steps)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Resume from a `state_dict`, also between two updates of a level.

        Raises:
            ValueError: other parameter groups or levels.
        """
        saved, present = _plan(state_dict["param_groups"]), _plan(self.param_groups)
        if saved != present:
            raise ValueError(f"level and period of the groups must be {present}, the saved ones are {saved}")
        super().load_state_dict(state_dict)
        periods = self.scheduler.periods
        self.scheduler.load_state_dict(
            {
                "periods": periods,
                "updates": {name: self.steps // period for name, period in periods.items()},
                "last_update": {name: self.steps // period * period for name, period in periods.items()},
            }
        )


def _looks_at_inputs(optimizer: Any) -> bool:
    inner = [*getattr(optimizer, "parts", ()), getattr(optimizer, "optimizer", None)]
    return isinstance(optimizer, InputAware) or any(_looks_at_inputs(o) for o in inner if o is not None)


def _parameters(groups: list[dict[str, Any]]) -> list[Tensor]:
    return [parameter for group in groups for parameter in group["params"]]


def _period(group: dict[str, Any]) -> int:
    return int(group.get("period", group.get("chunk_size", 1)))  # the latter in states of earlier versions


def _plan(groups: list[dict[str, Any]]) -> list[tuple[str | None, int]]:
    return [(group.get("level"), _period(group)) for group in groups]
