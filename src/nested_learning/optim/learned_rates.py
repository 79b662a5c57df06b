"""Learning rates of levels that are learned while training: hypergradient descent (Baydin et al. 2018)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from nested_learning.optim.base import is_rehearsal, restart_counters, run_closure, whole
from nested_learning.optim.wrapper import OptimizerWrapper

TINY = 1e-30


class LearnedRates(OptimizerWrapper):
    """Wraps any optimizer: every level has a factor on its updates that follows the hypergradient.

    The loss changes with the factor r of the last update Δ as ∇L · Δ / r. Baydin et al. (arXiv 1703.04782)
    step r against that. Here the step is relative and does not depend on any scale,

        r ← r (1 − β cos(∇L, Δ)),

    so r grows while gradients keep agreeing with the last update and shrinks when they turn against it.
    The factor is a tensor on the device of its level: nothing waits for it. Costs a copy of the parameters
    in memory. For slow levels, put this inside of a `MultiFrequencyOptimizer`.

    Args:
        optimizer: see `OptimizerWrapper`; its updates are proportional to its learning rate.
        levels: name of a level → its parameters; others are updated as always.
        beta: largest relative change of a factor per update, in (0, 1).

    Raises:
        ValueError: `beta` out of range, and see `OptimizerWrapper`.
    """

    keys = ("last_update",)

    def __init__(
        self, optimizer: Optimizer, levels: Mapping[str, Iterable[Tensor]], beta: float = 0.02
    ) -> None:
        if not 0 < beta < 1:
            raise ValueError(f"beta must be in (0, 1), got {beta}")
        super().__init__(optimizer, levels)
        self.beta = beta
        self.rates: dict[str, Tensor] = {}
        for group in self.param_groups:
            if "level" in group and group["level"] not in self.rates:
                self.rates[group["level"]] = torch.ones((), device=group["params"][0].device)
        self._write_rates()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Adjust the factors of the levels that have gradients, then update with them."""
        loss = run_closure(closure)
        rehearsal = is_rehearsal(self)
        moved = {name: [p for p in self._members(name) if p.grad is not None] for name in self.rates}
        before: dict[Tensor, Tensor] = {}
        for name, parameters in moved.items():
            agreement = self._unless_skipped(self._agreement(parameters))
            self.rates[name] = self.rates[name] * (1 - self.beta * agreement)
            before |= {p: p.clone() for p in parameters}
        self._step_inner()
        if rehearsal:
            restart_counters(self)
        for name, parameters in moved.items():
            for p in parameters:
                update = (p - before[p]) * self.rates[name].to(p.dtype)
                p.copy_(before[p] + update)
                self.state[p]["last_update"] = update
        self._write_rates()
        return loss

    def _agreement(self, parameters: list[Tensor]) -> Tensor | float:
        """cos(∇L, Δ) over the parameters of a level; 0 before its first update."""
        known = [
            (p.grad.float(), self.state[p]["last_update"].float())
            for p in parameters
            if "last_update" in self.state[p] and p.grad is not None
        ]
        if not known:
            return 0.0
        dot = sum(whole((g * u).sum()) for g, u in known)
        of_grads, of_updates = (
            sum(whole(t.square().sum()) for t in side) for side in zip(*known, strict=True)
        )
        return dot / (of_grads * of_updates + TINY).sqrt()  # type: ignore[union-attr]

    def _unless_skipped(self, agreement: Tensor | float) -> Tensor | float:
        """0 where `found_inf` tells the inner optimizer to skip this update, else 1."""
        found: Tensor | None = getattr(self, "found_inf", None)
        return agreement if found is None else torch.where(found.bool(), 0.0, agreement)

    def _members(self, name: str) -> list[Tensor]:
        return [p for group in self.groups_of(name) for p in group["params"]]

    def _write_rates(self) -> None:
        for name, rate in self.rates.items():
            for group in self.groups_of(name):
                group["rate"] = rate

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`."""
        super().load_state_dict(state_dict)
        for name in self.rates:
            group = self.groups_of(name)[0]
            self.rates[name] = group["rate"].to(group["params"][0].device)
