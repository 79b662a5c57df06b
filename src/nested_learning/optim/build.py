"""From a configuration to an optimizer.

To add a rule for matrices: write its class, its options as a dataclass and a field of `OptimConfig` (both in
`optim.config`), and one entry in `MATRIX_OPTIMIZERS` under the name of that field.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from nested_learning.checks import one_of
from nested_learning.optim.base import is_sharded
from nested_learning.optim.combined import Combined
from nested_learning.optim.config import OptimConfig
from nested_learning.optim.deep_momentum import DeepMomentum
from nested_learning.optim.delta_gd import DeltaGradientDescent, InputAware
from nested_learning.optim.delta_momentum import DeltaMomentum
from nested_learning.optim.m3 import M3
from nested_learning.optim.multi_frequency import MultiFrequencyOptimizer
from nested_learning.optim.param_groups import param_groups
from nested_learning.optim.schedules import constant, cosine
from nested_learning.optim.wrapper import split_by_level

Groups = list[dict[str, Any]]
Rule = Callable[[OptimConfig, Groups], Optimizer]
SlowLevels = Mapping[str, tuple[int, Sequence[str]]]
FUSED_DEVICES = ("cpu", "cuda")


def _adamw(config: OptimConfig, groups: Groups) -> Optimizer:
    fused = _can_fuse(groups)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)


def _sgd(config: OptimConfig, groups: Groups) -> Optimizer:
    sharded = any(is_sharded(p) for group in groups for p in group["params"])  # torch cannot fuse those
    fused = _can_fuse(groups) and not sharded
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, fused=fused)


OPTIMIZERS: dict[str, Rule] = {"adamw": _adamw, "sgd": _sgd}
"""Rules for all parameters."""
MATRIX_OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "muon": partial(torch.optim.Muon, adjust_lr_fn="match_rms_adamw"),
    "m3": M3,
    "dgd": DeltaGradientDescent,
    "delta_momentum": DeltaMomentum,
    "deep_momentum": DeepMomentum,
}
"""Rules for 2-D weights; AdamW takes embeddings, heads, norms, filters and initial memories.

They are called with `params`, `lr` and the fields of their options; an `InputAware` one with `model` too.
"""


def build_optimizer(config: OptimConfig, model: nn.Module, slow: SlowLevels | None = None) -> Optimizer:
    """The optimizer `config.name` over the parameter groups of `model` (see `param_groups`).

    Kernels are fused where all parameters are floating point and contiguous, on a CPU or a CUDA device.

    Args:
        config: name and rates.
        model: whose trainable parameters are updated.
        slow: levels that are updated every so many steps only: name → (steps, names of its parameters);
            see `MultiFrequencyOptimizer`. All other parameters are updated at every step.

    Raises:
        ValueError: an unknown `config.name`, a parameter that `model` does not have, or slow levels with
            "dgd", which knows the inputs of one step only.
    """
    groups = param_groups(model, config.weight_decay)
    if not slow:
        return _build(config, groups, model)
    if config.name == "dgd":
        raise ValueError(
            f"optim.name = dgd cannot update slow levels ({', '.join(slow)}); use another optimizer"
        )
    levels = {name: _find(model, names) for name, (_, names) in slow.items()}
    inner = _build(config, split_by_level(groups, levels), model)
    return MultiFrequencyOptimizer(inner, {name: steps for name, (steps, _) in slow.items()}, levels)


def _find(model: nn.Module, names: Iterable[str]) -> list[nn.Parameter]:
    """The trainable ones among the parameters called `names`."""
    parameters = dict(model.named_parameters())
    if unknown := [name for name in names if name not in parameters]:
        raise ValueError(f"the model has no parameter {unknown[0]!r}")
    return [parameters[name] for name in names if parameters[name].requires_grad]


def _build(config: OptimConfig, groups: Groups, model: nn.Module) -> Optimizer:
    if config.name in OPTIMIZERS:
        return OPTIMIZERS[config.name](config, groups)
    one_of("optim.name", config.name, (*OPTIMIZERS, *MATRIX_OPTIMIZERS))
    rule = MATRIX_OPTIMIZERS[config.name]
    watched = {"model": model} if isinstance(rule, type) and issubclass(rule, InputAware) else {}
    matrices, others = _split(groups, watched.get("model"))
    parts = []
    if matrices:
        options = asdict(getattr(config, config.name))
        parts.append(rule(params=matrices, lr=config.lr, **watched, **options))
    if others:
        parts.append(_adamw(config, [{**g, "lr_scale": config.adamw_lr_scale} for g in others]))
    return Combined(parts)


def _split(groups: Groups, model: nn.Module | None) -> tuple[Groups, Groups]:
    """Groups of 2-D weights of kind "matrix" (with `model`: of its linear layers only), and of the rest."""
    linear = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)} if model else None
    matrices: Groups = []
    others: Groups = []
    for group in groups:
        fits = [_is_for_rule(p, linear) and group["name"] == "matrix" for p in group["params"]]
        for side, wanted in ((matrices, True), (others, False)):
            chosen = [p for p, fit in zip(group["params"], fits, strict=True) if fit is wanted]
            side += [{**group, "params": chosen}] if chosen else []
    return matrices, others


def _is_for_rule(parameter: torch.Tensor, linear: set[int] | None) -> bool:
    return parameter.ndim == 2 and (linear is None or id(parameter) in linear)


def _can_fuse(groups: Groups) -> bool:
    """Whether torch's fused kernels are right for all: on a CPU they mix up entries of other layouts."""
    parameters = [p for group in groups for p in group["params"]]
    return all(
        p.device.type in FUSED_DEVICES and p.is_floating_point() and p.is_contiguous() for p in parameters
    )


def lr_at(config: OptimConfig, step: int, total_steps: int) -> float:
    """Learning rate of the update with number `step` (0-based) in a run of `total_steps`."""
    if config.schedule == "constant":
        return config.lr * constant(step, config.warmup_steps)
    return config.lr * cosine(step, total_steps, config.warmup_steps, config.min_lr_ratio)
