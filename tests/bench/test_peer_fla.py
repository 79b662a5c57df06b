"""Our linear mixer through the rule of flash-linear-attention, here a token loop of what its pages say."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from small_models import hope
from torch import Tensor

from nested_learning.bench.peer_fla import with_fla
from nested_learning.layers.config import MemoryConfig
from nested_learning.models.lm import HopeLM


def documented(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float, output_final_state: bool
) -> tuple[Tensor, Tensor]:
    """q, k `[B, T, H, K]`, v `[B, T, H, V]`, g (log decay) and beta `[B, T, H]` → (`[B, T, H, V]`,
    `[B, H, K, V]`): decay, erase what the key finds, write, read."""
    state, outputs = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3]), []
    for t in range(q.shape[1]):
        state = state * g[:, t, :, None, None].exp()
        found = torch.einsum("bhkv,bhk->bhv", state, k[:, t])
        new = (v[:, t] - found) * beta[:, t, :, None]
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], new)
        outputs.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t] * scale))
    return torch.stack(outputs, 1), state


@pytest.fixture(autouse=True)
def package(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("fla.ops.gated_delta_rule")
    module.chunk_gated_delta_rule = documented  # type: ignore[attr-defined]
    for name in ("fla", "fla.ops"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)


@pytest.mark.parametrize("retention", [True, False])
def test_both_give_the_same(retention: bool) -> None:
    torch.manual_seed(0)
    config = hope("linear", vocab_size=11, dim=16, num_layers=2, memory=MemoryConfig(retention=retention))
    tokens = torch.randint(11, (2, 19))
    torch.manual_seed(1)
    ours = HopeLM(config)
    torch.manual_seed(1)
    other = HopeLM(config)
    with_fla(other)
    (expected, state), (found, last) = ours(tokens), other(tokens)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for ours_held, held in zip(state.tensors(), last.tensors(), strict=True):
        torch.testing.assert_close(held, ours_held, rtol=1e-4, atol=1e-5)
    expected.square().mean().backward()
    found.square().mean().backward()
    for mine, its in zip(ours.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(its.grad, mine.grad, rtol=1e-3, atol=1e-6)


def test_what_the_rule_has_not_is_refused() -> None:
    model = HopeLM(hope("linear", dim=16, num_layers=1, memory=MemoryConfig(momentum=True)))
    with pytest.raises(ValueError, match="no momentum"):
        with_fla(model)
