"""What a configuration says of an optimizer, as it stands in the parameter groups."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from torch.optim import Optimizer

from nested_learning.optim.config import (
    DeepMomentumConfig,
    DeltaMomentumConfig,
    DGDConfig,
    M3Config,
    MuonConfig,
)

_RULES = (MuonConfig, M3Config, DGDConfig, DeltaMomentumConfig, DeepMomentumConfig)
OPTIONS = frozenset(
    ("weight_decay", "betas", "eps", "momentum", "lr_scale", *(f.name for r in _RULES for f in fields(r)))
)
"""Keys of a group that the configuration decides. The rate is not one: the schedule sets it at every step."""


def read_options(optimizer: Optimizer) -> list[dict[str, Any]]:
    """The options of every group."""
    return [{key: group[key] for key in group.keys() & OPTIONS} for group in optimizer.param_groups]


def write_options(optimizer: Optimizer, options: list[dict[str, Any]]) -> None:
    """Inverse of `read_options`: what else is in the groups, and all state, stays as it is."""
    for group, own in zip(optimizer.param_groups, options, strict=True):
        group.update(own)
