"""Check that a model can be trained here: its least memory against the memory of the device."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from nested_learning.models.lm import HopeLM
from nested_learning.optim.config import OptimConfig
from nested_learning.train.config import RunConfig
from nested_learning.train.strategy import Strategy

GIB = 2**30
MOMENTS = {"adamw": 2, "m3": 2, "muon": 1, "delta_momentum": 1, "deep_momentum": 1}  # per weight, at least
LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # of a container


def check_memory(config: RunConfig, strategy: Strategy) -> None:
    """Refuse a model whose weights, gradients and optimizer state alone exceed the memory.

    Nothing is allocated. Activations and fast weights need more, so a run that passes may still not fit.

    Raises:
        ValueError: the model cannot fit; the message names both sizes.
    """
    weights = weight_bytes(config)
    state = weights * (2 + least_moments(config.optim))
    shards = strategy.world_size if strategy.shards_parameters else 1
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # processes that share this machine
    on_card = strategy.device.type == "cuda" and not config.parallel.cpu_offload
    if on_card:
        card = torch.cuda.get_device_properties(strategy.device).total_memory
        _compare(state // shards, card, f"weights, gradients and optimizer state, on {strategy.device}")
        _compare(weights * local, host_bytes(), "weights while they are made, on this machine")
    else:
        needed = max(weights, state // shards) * local
        _compare(needed, host_bytes(), "weights, gradients and optimizer state, on this machine")


def weight_bytes(config: RunConfig) -> int:
    """Bytes of the parameters of a model, by building it without data.

    Raises:
        ValueError: the model has more elements than a tensor can have.
    """
    try:
        with torch.device("meta"):
            model = HopeLM(config.model)
    except RuntimeError as error:
        raise ValueError(f"a model with model.dim = {config.model.dim} cannot be built: {error}") from error
    return sum(p.numel() * p.element_size() for p in model.parameters())


def least_moments(optim: OptimConfig) -> int:
    """The least number of values that an optimizer stores per weight."""
    if optim.name == "sgd":
        return int(optim.momentum > 0)
    return MOMENTS.get(optim.name, 0)


def host_bytes() -> int:
    """Bytes of memory of this machine, or of the container if that has less."""
    sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for name in LIMITS:
        if Path(name).is_file() and (limit := Path(name).read_text().strip()).isdigit():
            sizes.append(int(limit))
    return min(sizes)


def _compare(needed: int, present: int, what: str) -> None:
    if needed > present:
        raise ValueError(
            f"the model is too large: {what}, need {needed / GIB:.1f} GiB of {present / GIB:.1f}; "
            "make model.dim or model.num_layers smaller"
        )
