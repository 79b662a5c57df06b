"""From a configuration to an optimizer. A new optimizer is one more entry in `OPTIMIZERS`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer

from nested_learning.optim.param_groups import param_groups
from nested_learning.optim.schedules import constant, cosine

if TYPE_CHECKING:
    from nested_learning.config import OptimConfig

Groups = list[dict[str, Any]]
FUSED_DEVICES = ("cpu", "cuda")


def _adamw(config: OptimConfig, groups: Groups, fused: bool) -> Optimizer:
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)


def _sgd(config: OptimConfig, groups: Groups, fused: bool) -> Optimizer:
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, fused=fused)


OPTIMIZERS: dict[str, Callable[[OptimConfig, Groups, bool], Optimizer]] = {"adamw": _adamw, "sgd": _sgd}


def build_optimizer(config: OptimConfig, model: nn.Module) -> Optimizer:
    """The optimizer `config.name` over the parameter groups of `model` (see `param_groups`).

    Kernels are fused where all parameters are floating point on a CPU or a CUDA device.

    Raises:
        ValueError: an unknown `config.name`.
    """
    if config.name not in OPTIMIZERS:
        raise ValueError(f"optim.name must be one of {', '.join(OPTIMIZERS)}, got {config.name!r}")
    fused = all(p.device.type in FUSED_DEVICES and p.is_floating_point() for p in model.parameters())
    return OPTIMIZERS[config.name](config, param_groups(model, config.weight_decay), fused)


def lr_at(config: OptimConfig, step: int, total_steps: int) -> float:
    """Learning rate of the update with number `step` (0-based) in a run of `total_steps`."""
    if config.schedule == "constant":
        return config.lr * constant(step, config.warmup_steps)
    return config.lr * cosine(step, total_steps, config.warmup_steps, config.min_lr_ratio)
