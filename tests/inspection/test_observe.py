"""What is seen of a memory, against the token loops of the equations, whose every write is overheard."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import naive_cms
import naive_linear
import naive_self_modifying
import naive_self_modifying_linear
import pytest
import torch
from naive_self_modifying import NaiveMemory
from naive_streams import controlled, slow_streams, unit
from oracle import liven
from tolerances import assert_same
from torch import Tensor, nn

from nested_learning.inspection.observe import Seen, observe
from nested_learning.layers.cms import CMS, FastLevel
from nested_learning.layers.config import MemoryConfig
from nested_learning.layers.linear import GatedDeltaRule
from nested_learning.layers.self_modifying import SelfModifyingTitans, TitansMemory
from nested_learning.layers.self_modifying_linear import SelfModifyingLinear
from nested_learning.levels import LevelSpec

LIVELY: dict[str, Any] = {"eta_bias": 0.0, "alpha_bias": 1.0}
DIM, HEADS, TOKENS = 8, 2, 14  # with chunks of 4: three writes, and two tokens that wait
LENGTH = TOKENS * DIM
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "self_mod": lambda: SelfModifyingTitans(DIM, HEADS, 4, config=MemoryConfig(**LIVELY)),
    "all_adaptive": lambda: SelfModifyingTitans(
        DIM, HEADS, 4, config=MemoryConfig(**LIVELY, adaptive=("k", "v", "q", "eta", "alpha"), hidden=5)
    ),
    "two_chunks": lambda: SelfModifyingTitans(
        DIM, HEADS, 4, config=MemoryConfig(**LIVELY, projection_chunk_size=2)
    ),
    "long_projections": lambda: SelfModifyingTitans(
        DIM, HEADS, 2, config=MemoryConfig(**LIVELY, projection_chunk_size=4)
    ),
    "after_write": lambda: SelfModifyingTitans(DIM, HEADS, 4, "after_write", MemoryConfig(**LIVELY)),
    "towards_init": lambda: SelfModifyingTitans(
        DIM, HEADS, 4, config=MemoryConfig(**LIVELY, retention_target="init")
    ),
    "momentum": lambda: SelfModifyingTitans(DIM, HEADS, 4, config=MemoryConfig(**LIVELY, momentum=True)),
    "error_limit": lambda: SelfModifyingTitans(DIM, HEADS, 4, config=MemoryConfig(**LIVELY, error_limit=0.5)),
    "titans": lambda: TitansMemory(DIM, HEADS, 4, config=MemoryConfig(**LIVELY)),
    "titans_no_delta": lambda: TitansMemory(DIM, HEADS, 4, config=MemoryConfig(**LIVELY, delta=False)),
    "linear": lambda: GatedDeltaRule(DIM, HEADS, 4, MemoryConfig(**LIVELY)),
    "linear_momentum": lambda: GatedDeltaRule(DIM, HEADS, 4, MemoryConfig(**LIVELY, momentum=True)),
    "linear_no_delta": lambda: GatedDeltaRule(DIM, HEADS, 4, MemoryConfig(**LIVELY, delta=False)),
    "self_mod_linear": lambda: SelfModifyingLinear(DIM, HEADS, 4, config=MemoryConfig(**LIVELY)),
    "capped": lambda: SelfModifyingLinear(DIM, HEADS, 4, config=MemoryConfig(**LIVELY, injection_cap=True)),
    "level": lambda: FastLevel(DIM, LevelSpec(name="f", chunk_size=4), MemoryConfig(**LIVELY)),
    "level_same": lambda: FastLevel(
        DIM,
        LevelSpec(name="f", chunk_size=4, key="projected", target="same", eta=0.1),
        MemoryConfig(**LIVELY),
    ),
}


def make(name: str) -> tuple[Any, Tensor]:
    """A layer of large steps and fast forgetting, and its input."""
    torch.manual_seed(0)
    layer = LAYERS[name]().double()
    liven(layer)
    return layer, torch.randn(1, TOKENS, DIM, dtype=torch.float64)


def look(layer: nn.Module, x: Tensor) -> dict[str, list[Seen]]:
    """What is seen of every memory, in order."""
    found: dict[str, list[Seen]] = {}
    with torch.no_grad():
        for seen in observe(layer, x):
            found.setdefault(seen.name, []).append(seen)
    return found


def joined(seen: list[Seen], value: str) -> Tensor:
    """A number of every token `[H, T]`."""
    return torch.cat([getattr(one, value) for one in seen], 1)


@pytest.mark.parametrize("name", LAYERS)
def test_forgetting_and_the_contributions_of_the_tokens_are_the_write(name: str) -> None:
    layer, x = make(name)
    for memory in look(layer, x).values():
        written = [one for one in memory if one.after is not None]
        assert len(written) >= 3 and joined(memory, "eta").shape[1] == TOKENS
        initial = written[0].before
        # the momentum of earlier chunks is no contribution of these tokens
        for one in written[: 1 if layer.config.momentum else None]:
            kept = one.alpha.prod(1)[:, None, None]
            for matrix, products in one.products.items():
                rest = (1 - kept) * initial[matrix] if layer.config.to_initial else 0
                expected = kept * one.before[matrix] + rest + products.total()
                assert_same(one.after[matrix], expected, LENGTH)
        for before, after in pairwise(written):
            assert_same(after.before, before.after, 0)


def overhear(monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> list[tuple[tuple[Any, ...], Any]]:
    """Arguments and result of every call of a function of a token loop."""
    calls: list[tuple[tuple[Any, ...], Any]] = []
    called = getattr(module, name)

    def listen(*given: Any, **named: Any) -> Any:
        result = called(*given, **named)
        calls.append((given, result))
        return result

    monkeypatch.setattr(module, name, listen)
    return calls


@pytest.mark.parametrize(
    "name",
    [name for name in LAYERS if not name.startswith(("linear", "level", "self_mod_linear", "capped"))],
)
def test_self_modifying_memories_are_those_of_the_token_loop(name: str, monkeypatch) -> None:
    layer, x = make(name)
    found = look(layer, x)
    errors = overhear(monkeypatch, naive_self_modifying, "errors")
    writes = overhear(monkeypatch, NaiveMemory, "write")
    _, finals = naive_self_modifying.naive_self_modifying(layer, x)
    assert found.keys() == dict(layer.chunks).keys()
    for number, (memory, _) in enumerate(layer.chunks):
        seen = found[memory]
        mine = slice(number, None, len(found))
        rates = [given[3] for given, _ in writes[mine]]
        assert_same(joined(seen, "eta"), torch.stack([r[0][0] for r in rates], -1), LENGTH)
        assert_same(joined(seen, "alpha"), torch.stack([r[1][0] for r in rates], -1), LENGTH)
        lengths = [at_output[0].norm(dim=-1) for _, (_, at_output, _) in errors[mine]]
        assert_same(joined(seen, "surprise"), torch.stack(lengths, -1), LENGTH)
        last = [one.after for one in seen if one.after is not None][-1]
        assert_same(last["W1"], finals[memory][0][0], LENGTH)
        assert_same(last["W2"], finals[memory][1][0], LENGTH)


@pytest.mark.parametrize("name", ["self_mod_linear", "capped"])
def test_linear_memories_are_those_of_the_token_loop(name: str, monkeypatch) -> None:
    layer, x = make(name)
    found = look(layer, x)
    steps = overhear(monkeypatch, naive_self_modifying_linear, "step")
    _, finals = naive_self_modifying_linear.naive_self_modifying_linear(layer, x)
    order = [memory.removeprefix("initial_") for memory in layer.memories]
    assert list(found) == order
    for number, memory in enumerate(order):
        mine = [given for given, _ in steps[number :: len(order)]]
        seen = found[memory]
        assert_same(joined(seen, "eta"), torch.stack([given[4][0][0] for given in mine], -1), LENGTH)
        assert_same(joined(seen, "alpha"), torch.stack([given[4][1][0] for given in mine], -1), LENGTH)
        lengths = torch.stack([given[3][0].norm(dim=-1) for given in mine], -1)
        assert_same(joined(seen, "surprise"), lengths, LENGTH)
        last = [one.after for one in seen if one.after is not None][-1]
        assert_same(last["W"], finals[memory][0][0], LENGTH)


@pytest.mark.parametrize("name", ["linear", "linear_no_delta", "linear_momentum"])
def test_a_matrix_is_that_of_the_token_loop(name: str) -> None:
    layer, x = make(name)
    (seen,) = look(layer, x).values()
    empty = torch.zeros(HEADS, DIM // HEADS, DIM // HEADS, dtype=x.dtype)
    every = [(empty, empty)]  # W and S after every token
    for t in range(TOKENS):
        _, finals = naive_linear.naive_linear(layer, x[:, : t + 1])
        every.append((finals[0][0], finals[1][0] if layer.config.momentum else empty))
    rates = torch.sigmoid(x[0] @ layer.rates.weight.T + layer.rates.bias).view(TOKENS, -1, HEADS)
    alpha, beta = rates[:, 1], rates[:, -1]
    eta = controlled(layer.config, rates[:, 0], alpha)
    assert_same(joined(seen, "eta"), eta.T, LENGTH)
    assert_same(joined(seen, "alpha"), alpha.T, LENGTH)
    for one, last in zip(seen, (4, 8, 12, 14), strict=True):
        assert_same(one.after["W"], every[last][0], LENGTH)
    (keys, _, _), _ = slow_streams(layer, x)  # a token adds η (W k − v) kᵀ, and k is a little shorter than 1
    lengths = unit(keys)[0].norm(dim=-1)
    for t, ((before, moments), (after, _)) in enumerate(pairwise(every)):
        kept = alpha[t, :, None, None] * before + beta[t, :, None, None] * moments
        expected = (after - kept).norm(dim=(-2, -1)) / eta[t] / lengths[t]
        assert_same(joined(seen, "surprise")[:, t], expected, LENGTH)


@pytest.mark.parametrize("name", ["level", "level_same"])
def test_a_fast_level_is_that_of_the_token_loop(name: str, monkeypatch) -> None:
    layer, x = make(name)
    (seen,) = look(layer, x).values()
    errors = overhear(monkeypatch, naive_cms, "errors")
    steps = overhear(monkeypatch, naive_cms, "step")
    naive = naive_cms.NaiveLevel(layer, 1)
    for t in range(TOKENS):
        naive(x[:, t])
    lengths = [at_output.norm(dim=-1) for _, (_, at_output, _) in errors]
    assert_same(joined(seen, "surprise"), torch.stack(lengths, -1), LENGTH)
    rates = [given[4] for given, _ in steps[::2]]
    assert_same(joined(seen, "eta"), torch.stack([r[0] for r in rates], -1), LENGTH)
    assert_same(joined(seen, "alpha"), torch.stack([r[1] for r in rates], -1), LENGTH)
    last = [one.after for one in seen if one.after is not None][-1]
    assert_same([last["W1"], last["W2"]], naive.chunk_start, LENGTH)


def test_a_level_that_is_reset_keeps_nothing_of_its_chunk() -> None:
    torch.manual_seed(0)
    levels = (LevelSpec(name="quick", chunk_size=2), LevelSpec(name="late", chunk_size=4))
    cms = CMS(DIM, levels, "nested", MemoryConfig(**LIVELY)).double()
    (seen,) = look(cms.levels[0], torch.randn(1, 8, DIM, dtype=torch.float64)).values()
    assert [one.reset for one in seen] == [False, True, False, True]
    initial = seen[0].before
    for one in seen:
        moved = max(float((one.after[m] - initial[m]).abs().max()) for m in initial)
        added = max(float(products.total().abs().max()) for products in one.products.values())
        assert (moved == 0.0 and added == 0.0) if one.reset else (moved > 1e-3 and added > 1e-3)


def test_a_layer_without_memories_is_refused() -> None:
    with pytest.raises(TypeError, match="Linear has no memories"):
        observe(nn.Linear(2, 2), torch.zeros(1, 1, 2))
