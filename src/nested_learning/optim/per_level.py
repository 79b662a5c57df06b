"""One optimizer per level, for training loops that decide themselves when each of them steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from nested_learning.aliases import our_keywords
from nested_learning.checks import one_of
from nested_learning.optim.learned_rates import LearnedRates

TYPES: dict[str, Callable[..., Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
}


@our_keywords
def setup_optimizers(
    model: nn.Module,
    periods: Mapping[str, int],
    base_lr: float = 1e-4,
    optimizer_type: str = "adamw",
    learn_rates: float | None = None,
) -> dict[str, Optimizer]:
    """One optimizer for every level of `model.levels`, with learning rate `base_lr / period`.

    Args:
        model: has `levels`, an `nn.ModuleDict` that holds all of its trainable parameters.
        periods: name of a level → steps between two of its updates.
        base_lr: learning rate of a level that is updated at every step.
        optimizer_type: "adam", "adamw" or "sgd".
        learn_rates: learn a factor on each level's learning rate, by at most this part per update (see
            `LearnedRates`); None = fixed rates.

    Returns:
        Name of a level → its optimizer.

    Raises:
        ValueError: an unknown type, names that differ from those of the levels, a rate or period
            that is not positive, or parameters outside of all levels, which nothing would update.
    """
    levels: Any = model.levels
    one_of("optimizer_type", optimizer_type, TYPES)
    if base_lr <= 0:
        raise ValueError(f"base_lr must be positive, got {base_lr}")
    if set(periods) != set(levels):
        raise ValueError(f"periods must name the levels {list(levels)}, got {list(periods)}")
    held = set(levels.parameters())
    outside = [name for name, p in model.named_parameters() if p.requires_grad and p not in held]
    if outside:
        raise ValueError(f"parameters outside of model.levels would never be updated: {', '.join(outside)}")
    optimizers: dict[str, Optimizer] = {}
    for name, period in periods.items():
        if period < 1:
            raise ValueError(f"periods[{name!r}] must be at least 1, got {period}")
        parameters = [p for p in levels[name].parameters() if p.requires_grad]
        optimizer = TYPES[optimizer_type](parameters, lr=base_lr / period)
        if learn_rates is not None:
            optimizer = LearnedRates(optimizer, {name: parameters}, learn_rates)
        optimizers[name] = optimizer
    return optimizers
