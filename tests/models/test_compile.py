"""Compiled models: the same numbers as eager ones, and no second compilation."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from tolerances import assert_same

from nested_learning.models.compile import compile_model
from nested_learning.models.config import HopeConfig, MemoryConfig
from nested_learning.models.lm import HopeLM
from nested_learning.ops.memory_mlp import fused
from nested_learning.ops.self_modifying import scan


@pytest.fixture(autouse=True)
def eager_afterwards() -> Iterator[None]:
    before = [(kernels, vars(kernels).copy()) for kernels in (fused.kernels, scan.kernels)]
    yield
    for kernels, functions in before:
        vars(kernels).update(functions)
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.parametrize("keep_every", [None, 2])
def test_compiled_model_gives_the_same_gradients_and_compiles_once(keep_every: int | None) -> None:
    torch.manual_seed(0)
    memory = MemoryConfig(keep_every=keep_every)
    config = HopeConfig(vocab_size=31, dim=16, num_layers=2, num_heads=2, chunk_size=4, memory=memory)
    model = HopeLM(config)
    tokens = torch.randint(31, (2, 12))

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model(tokens)[0].logsumexp(-1).sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    expected = gradients()
    compile_model(model)
    assert_same(gradients(), expected, length=2 * 12 * 16, factor=10)
    with torch.compiler.set_stance("fail_on_recompile"):
        gradients()
