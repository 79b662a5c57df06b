"""Gradients of gradients through the writes: products with the Hessian against finite differences."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from nested_learning.layers.cms import CMS
from nested_learning.layers.config import READS, MemoryConfig
from nested_learning.layers.linear import GatedDeltaRule
from nested_learning.layers.self_modifying import SelfModifyingTitans, TitansMemory
from nested_learning.layers.self_modifying_linear import SelfModifyingLinear
from nested_learning.levels import LevelSpec

LIVELY = {"eta_max": 1.0, "eta_bias": 0.0, "alpha_bias": 1.0}  # large steps, fast forgetting
MEMORIES = {
    "default": MemoryConfig(**LIVELY),
    "momentum_towards_init": MemoryConfig(**LIVELY, momentum=True, retention_target="init"),
    "no_delta": MemoryConfig(**LIVELY, delta=False),
    "keep_every": MemoryConfig(**LIVELY, keep_every=1),
}
LAYERS: dict[str, Callable[[MemoryConfig], nn.Module]] = {
    **{
        f"self_mod_{read}": lambda config, read=read: SelfModifyingTitans(4, 2, 3, read, config)
        for read in READS
    },
    "self_mod_linear": lambda config: SelfModifyingLinear(4, 2, 3, "before_write", config),
    "titans": lambda config: TitansMemory(4, 2, 3, config=config),
    "linear": lambda config: GatedDeltaRule(4, 2, 3, config),
    "fast_level": lambda config: CMS(4, [LevelSpec(name="fast", chunk_size=3)], memory=config),
}
STEP = 2e-5  # of the finite differences of four points, whose error goes with its fourth power


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("name", LAYERS)
def test_products_with_the_hessian_are_finite_differences_of_the_gradient(name: str, memory: str) -> None:
    torch.manual_seed(0)
    layer = LAYERS[name](MEMORIES[memory]).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    names = [name for name, _ in layer.named_parameters()]
    x = torch.randn(2, 8, 4, dtype=torch.float64)  # two chunks are written, a third is not finished
    values = [x, *(parameter.detach() for parameter in layer.parameters())]
    probe = torch.randn(x.shape, dtype=x.dtype)
    way = [torch.randn_like(value) for value in values]

    def gradient(values: list[Tensor], again: bool) -> tuple[list[Tensor], list[Tensor]]:
        at = [value.clone().requires_grad_() for value in values]
        y, _ = torch.func.functional_call(layer, dict(zip(names, at[1:], strict=True)), (at[0],))
        loss = (y * probe).sum() + y.pow(3).sum()
        return at, list(torch.autograd.grad(loss, at, create_graph=again))

    at, slopes = gradient(values, again=True)
    along = sum((slope * w).sum() for slope, w in zip(slopes, way, strict=True))
    exact = torch.autograd.grad(along, at)

    def slopes_at(size: float) -> list[Tensor]:
        return gradient([value + size * w for value, w in zip(values, way, strict=True)], again=False)[1]

    ends = [slopes_at(size * STEP) for size in (1, -1, 2, -2)]
    for label, product, a, b, c, d in zip(["x", *names], exact, *ends, strict=True):
        measured = (8 * (a - b) - (c - d)) / (12 * STEP)
        assert measured.abs().max() > 1e-3, label
        assert (product - measured).norm() < 1e-6 * measured.norm(), label
