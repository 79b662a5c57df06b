"""Levels that the outer optimizer updates at their own frequency (Eq. 71 with optimizer steps for tokens)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from nested_learning.levels import ChunkedUpdateScheduler
from nested_learning.optim.wrapper import OptimizerWrapper, run_closure


class MultiFrequencyOptimizer(OptimizerWrapper):
    """Wraps any optimizer: a level with chunk size C is updated at steps C, 2C, … only.

    Use it like the optimizer inside: `zero_grad`, `backward`, clip, `step`. `.grad` is always the gradient
    of this step; what a level has gathered since its last update is kept here, so clipping limits each
    step's own contribution. Between its updates nothing of a level moves: no weight decay, no moments.
    An update uses the *sum* of the gathered gradients and a learning rate of `lr / C`: the sum is that of
    Eq. 71, and with SGD both together make the level as fast as one that moves at every step. (Adam's step
    does not depend on the gradient's size; there the level becomes C times slower per update.)

    Args:
        optimizer: see `OptimizerWrapper`. Its parameters outside of all levels are updated at every step.
        chunk_sizes: name of a level → steps between two of its updates.
        levels: name of a level → its parameters; the same names.
        scale_lr: divide a level's learning rate by its chunk size.
        average: use the mean of the gathered gradients in place of their sum.

    Raises:
        ValueError: names that differ, and see `ChunkedUpdateScheduler` and `OptimizerWrapper`.

    Example:
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        >>> optimizer = MultiFrequencyOptimizer(optimizer, {"slow": 16}, {"slow": model.mlp.parameters()})
    """

    key = "accumulated"

    def __init__(
        self,
        optimizer: Optimizer,
        chunk_sizes: Mapping[str, int],
        levels: Mapping[str, Iterable[Tensor]],
        *,
        scale_lr: bool = True,
        average: bool = False,
    ) -> None:
        self.scheduler = ChunkedUpdateScheduler(chunk_sizes)
        if set(chunk_sizes) != set(levels):
            raise ValueError(
                f"chunk_sizes and levels must have the same names, got {list(chunk_sizes)} and {list(levels)}"
            )
        super().__init__(optimizer, levels)
        self.scale_lr, self.average = scale_lr, average
        for name, size in chunk_sizes.items():
            for group in self.groups_of(name):
                group["chunk_size"] = size
        self._set_clock(0)

    @property
    def steps(self) -> int:
        """Number of steps made."""
        return int(self.param_groups[0]["clock"])

    def statistics(self) -> dict[str, dict[str, int]]:
        """Per level: `chunk_size`, number of `updates`, step of the `last_update`."""
        return self.scheduler.statistics()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the levels that are due, and all parameters outside of levels.

        Gradients are kept in float32 at least. Nothing is read from the device.

        Returns:
            The value of `closure`, which is called first; None without one.
        """
        loss = run_closure(closure)
        step = self.steps + 1
        due = self.scheduler.due(step)
        slow = self._slow_groups()
        own = [(p, p.grad) for group in slow for p in group["params"]]
        rates = [group["lr"] for group in slow]
        for group in slow:
            self._gather(group, group["level"] in due)
            if self.scale_lr:
                group["lr"] = group["lr"] / _chunk_size(group)
        try:
            self._step_inner()
        finally:
            for group, rate in zip(slow, rates, strict=True):
                group["lr"] = rate
            for parameter, gradient in own:
                parameter.grad = gradient
        for name in due:
            self.scheduler.mark_updated(name, step)
        self._set_clock(step)
        return loss

    def _gather(self, group: dict[str, Any], due: bool) -> None:
        """Add this step's gradients to those kept; show the inner optimizer the sum, or nothing."""
        for parameter in group["params"]:
            gradient, kept = parameter.grad, self.kept.get(parameter)
            if gradient is not None:
                wide = torch.promote_types(gradient.dtype, torch.float32)
                kept = gradient.to(wide, copy=True) if kept is None else kept.add_(gradient)
                self.kept[parameter] = kept
            parameter.grad = None
            if due and kept is not None:
                total = kept / _chunk_size(group) if self.average else kept
                parameter.grad = total.to(parameter.dtype)
                del self.kept[parameter]

    def _slow_groups(self) -> list[dict[str, Any]]:
        return [group for group in self.param_groups if _chunk_size(group) > 1]

    def _set_clock(self, step: int) -> None:
        """The clock is part of the groups, so that it is saved by all that saves an optimizer."""
        for group in self.param_groups:
            group["clock"] = step

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`, in the middle of a window too.

        Raises:
            ValueError: other parameter groups or levels.
        """
        saved, present = _plan(state_dict["param_groups"]), _plan(self.param_groups)
        if saved != present:
            raise ValueError(
                f"level and chunk size of the groups must be {present}, the saved ones are {saved}"
            )
        super().load_state_dict(state_dict)
        sizes = self.scheduler.chunk_sizes
        self.scheduler.load_state_dict(
            {
                "chunk_sizes": sizes,
                "updates": {name: self.steps // size for name, size in sizes.items()},
                "last_update": {name: self.steps // size * size for name, size in sizes.items()},
            }
        )


def _chunk_size(group: dict[str, Any]) -> int:
    return int(group.get("chunk_size", 1))


def _plan(groups: list[dict[str, Any]]) -> list[tuple[str | None, int]]:
    return [(group.get("level"), _chunk_size(group)) for group in groups]
