"""How a run is spread over processes. Only the single process is implemented so far.

A strategy is all that the trainer knows of parallelism: it wraps the model, sums numbers over ranks
and says which rank writes files.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn


class Strategy(Protocol):
    """What the trainer asks of a way to spread a run."""

    rank: int
    world_size: int

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and prints."""
        ...

    def wrap(self, model: nn.Module) -> nn.Module:
        """The module to call in training; `model` stays the one to save."""
        ...

    def sum(self, value: Tensor) -> Tensor:
        """`value` summed over all ranks."""
        ...

    def clip(self, model: nn.Module, max_norm: float | None) -> Tensor:
        """Global norm of the gradient; scales it down to `max_norm` if that is not None."""
        ...


class SingleStrategy:
    """One process, one device."""

    rank = 0
    world_size = 1
    is_main = True

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model itself."""
        return model

    def sum(self, value: Tensor) -> Tensor:
        """The value itself."""
        return value

    def clip(self, model: nn.Module, max_norm: float | None) -> Tensor:
        """Global norm of the gradient, a scalar; see `Strategy.clip`."""
        limit = float("inf") if max_norm is None else max_norm
        return torch.nn.utils.clip_grad_norm_(model.parameters(), limit)


def build_strategy(name: str) -> Strategy:
    """The strategy called `name`.

    Raises:
        ValueError: an unknown name.
    """
    if name != "single":
        raise ValueError(f"strategy must be one of single, got {name!r}")
    return SingleStrategy()
