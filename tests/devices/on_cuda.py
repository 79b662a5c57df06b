"""Fake CUDA tensors, see the fixture `fake_cuda`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

import torch
from small_models import hope
from torch import Tensor

from nested_learning.layers.config import MemoryConfig
from nested_learning.levels import LevelSpec
from nested_learning.models.config import HopeConfig

T = TypeVar("T")
SIZES: dict[str, Any] = {"vocab_size": 11, "dim": 8, "num_layers": 1, "num_heads": 2, "chunk_size": 4}
LENGTH = 9  # two chunks of 4 and an unfinished one
BLOCK = 8  # documents begin at multiples of it
MLP = LevelSpec(name="mlp", expansion=1.0)
FAST = LevelSpec(name="fast", chunk_size=4)
SLOW = LevelSpec(name="slow", chunk_size=64, expansion=1.0)
LEVELS = {
    "mlp": MLP,
    "fast": FAST,
    "fast projected": LevelSpec(name="fast", chunk_size=4, key="projected"),
    "fast same": LevelSpec(name="fast", chunk_size=4, target="same"),
    "fast projected same": LevelSpec(name="fast", chunk_size=4, key="projected", target="same"),
    "fast fixed": LevelSpec(name="fast", chunk_size=4, eta=0.1, gain=None, expansion=0.5, momentum=True),
    "fast bare": LevelSpec(name="fast", chunk_size=4, eta=0.1, retention=False, delta=False),
    "slow": SLOW,
}
MEMORIES: dict[str, MemoryConfig] = {
    "plain": MemoryConfig(),
    "momentum": MemoryConfig(momentum=True),
    "no delta": MemoryConfig(delta=False),
    "no retention": MemoryConfig(retention=False),
    "retention to start": MemoryConfig(retention_target="init"),
    "momentum and start": MemoryConfig(momentum=True, retention_target="init"),
    "short projections": MemoryConfig(projection_chunk_size=2),
    "long projections": MemoryConfig(projection_chunk_size=8),
    "error limit": MemoryConfig(error_limit=0.5),
    "hidden": MemoryConfig(hidden=6),
    "eta": MemoryConfig(eta_max=2.0, eta_bias=-1.0, alpha_bias=3.0, projection_eta_max=0.5),
    "injection cap": MemoryConfig(injection_cap=True),
    "no step control": MemoryConfig(step_control="none"),
    "nothing adaptive": MemoryConfig(adaptive=()),
    "only keys adaptive": MemoryConfig(adaptive=("k",)),
    "outside targets": MemoryConfig(self_targets=False),
    "targets with gradient": MemoryConfig(stop_gradient_targets=False),
    "keep every": MemoryConfig(keep_every=2),
}


def small(mixer: str = "attention", **changes: Any) -> HopeConfig:
    """A configuration of one small block, without the options that nothing reads."""
    return hope(mixer=mixer, window=3, **{**SIZES, **changes})


def made_on_cuda(make: Callable[[], T]) -> T:
    """What `make` makes on CUDA. As default device later on, CUDA would hide a device that is forgotten."""
    with torch.device("cuda"):
        return make()


def tokens(rows: int = 2, length: int = LENGTH) -> Tensor:
    """Tokens `[rows, length]` on CUDA."""
    return torch.zeros(rows, length, dtype=torch.int64, device="cuda")


def documents() -> Tensor:
    """Two documents in every row, `[2, LENGTH]` on CUDA."""
    return (torch.arange(LENGTH, device="cuda") >= BLOCK).long().expand(2, -1)


@contextmanager
def autocast() -> Iterator[None]:
    """Autocast to bf16 on CUDA, which `torch.autocast` turns off where there is no card."""
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.set_autocast_enabled("cuda", True)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)


def devices_of(*values: Any) -> set[str]:
    """Kinds of the devices of all tensors in nested values; the counters of attention are the CPU's."""
    return {tensor.device.type for value in values for tensor in _tensors(value)}


def _tensors(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif hasattr(value, "tensors"):
        yield from value.tensors()
    elif is_dataclass(value):
        for field in fields(value):
            yield from _tensors(getattr(value, field.name))
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
