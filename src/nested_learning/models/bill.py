"""What a model holds: parameters, and fast weights per sequence; counted on a model without storage."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nested_learning.models.config import HopeConfig
from nested_learning.models.lm import HopeLM
from nested_learning.state import State


@dataclass(frozen=True, slots=True)
class Bill:
    """Floats of one block's state per sequence at the start of a context.

    Args:
        mixer: of the sequence mixer; 0 for attention, whose cache grows with what it reads.
        levels: of every fast level, by name.
    """

    mixer: int
    levels: dict[str, int]

    @property
    def total(self) -> int:
        """All of them."""
        return self.mixer + sum(self.levels.values())


def fast_weight_bill(config: HopeConfig) -> list[Bill]:
    """The bill of every block of a model. Costs no memory, whatever the size of the model."""
    with torch.device("meta"):
        state = HopeLM(config).init_state(1)
    bills = []
    for number, layer in enumerate(state.layers):
        names = [level.name for level in config.levels_of(number)]
        levels = {
            name: _numel(level)
            for name, level in zip(names, layer.memory.levels, strict=True)
            if level is not None
        }
        bills.append(Bill(_numel(layer.mixer), levels))
    return bills


def count_parameters(config: HopeConfig) -> int:
    """Parameters of a model. Costs no memory either."""
    with torch.device("meta"):
        return sum(p.numel() for p in HopeLM(config).parameters())


def _numel(state: object) -> int:
    return state.numel() if isinstance(state, State) else 0
