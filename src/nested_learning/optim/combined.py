"""Several optimizers as one: matrices by one rule, everything else by AdamW."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from nested_learning.optim.base import is_rehearsal, restart_counters, restore_precision, run_closure


class Combined(Optimizer):
    """One optimizer made of several, each with parameter groups of its own.

    Groups and state are those of one ordinary optimizer, so schedulers, checkpoints and wrappers need no code
    for the parts. A group's `lr_scale` multiplies its learning
    rate, so that one schedule can serve groups of different speed.

    Args:
        parts: optimizers that share no parameter. They must not be used on their own afterwards.

    Raises:
        ValueError: no part, or a parameter in two of them.
    """

    def __init__(self, parts: Sequence[Optimizer]) -> None:
        if not parts:
            raise ValueError("Combined needs at least one optimizer, got none")
        self.parts = list(parts)
        self._counts = [len(part.param_groups) for part in parts]
        super().__init__([group for part in parts for group in part.param_groups], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """A step of every part; returns what `closure` does, if given."""
        loss = run_closure(closure)
        rehearsal = is_rehearsal(self)
        self._bind()
        for part in self.parts:
            part.step()
        if rehearsal:
            restart_counters(self)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Zero all parts; some also clear captured inputs."""
        self._bind()
        for part in self.parts:
            part.zero_grad(set_to_none)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state as it was saved, in its own precision."""
        super().load_state_dict(state_dict)
        restore_precision(self, state_dict)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Used by the constructor only. Raises ValueError afterwards, because no part would own the new
        group."""
        if len(self.param_groups) == sum(self._counts):
            raise ValueError("add a parameter group to a part before it is combined")
        super().add_param_group(param_group)

    def _bind(self) -> None:
        """Point each part at its groups, with `lr_scale` applied, and at the common state."""
        first = 0
        for part, count in zip(self.parts, self._counts, strict=True):
            part.state = self.state
            part.param_groups = [
                {**group, "lr": group["lr"] * group.get("lr_scale", 1.0)}
                for group in self.param_groups[first : first + count]
            ]
            first += count

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "parts": self.parts, "_counts": self._counts}
