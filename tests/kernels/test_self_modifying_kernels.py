"""The kernels of self-modifying Titans: against the other implementation, in layers, compiled for cards."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from interpreter import interpreted
from ptx import SHARED, usage
from torch import Tensor

from nested_learning.layers import self_modifying
from nested_learning.layers.config import MemoryConfig
from nested_learning.layers.self_modifying import SelfModifyingTitans, TitansMemory
from nested_learning.ops import self_modifying as package
from nested_learning.ops.self_modifying import triton as compiled
from nested_learning.ops.self_modifying.backward import backward
from nested_learning.ops.self_modifying.chunk import Bank, SelfModRule
from nested_learning.ops.self_modifying.forward import VARYING, forward

CPU = torch.device("cpu")
NAME = "nested_learning.ops.self_modifying.triton"
EXACT = 1e-5  # in float32, of the largest entry
RULES: dict[str, tuple[SelfModRule, tuple[str, ...]]] = {
    "default": (SelfModRule(), ("k", "v", "eta", "alpha")),
    "all adaptive": (SelfModRule(), ("k", "v", "q", "eta", "alpha")),
    "slow targets": (SelfModRule(self_targets=False), ("k", "alpha")),
    "targets without gradient": (SelfModRule(stop_gradient_targets=True), ("v", "eta")),
    "no retention": (SelfModRule(retention=False), ("k", "eta")),
    "steps up to 2, bounded by retention": (SelfModRule(eta_max=2.0), ("q", "eta", "alpha")),
    "steps up to 2, not bounded": (SelfModRule(eta_max=2.0, step_control="none"), ("v",)),
    "Titans": (SelfModRule(self_targets=False), ()),
}


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    return interpreted(NAME)


@pytest.fixture
def launched(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Layers run on the interpreted kernels. The list gets the name of every kernel that is started."""
    started: list[str] = []
    launch = kernels.Launches._launch

    def counted(self: Any, kernel: Any, *arguments: Any, **flags: bool) -> None:
        started.append(kernel.fn.__name__)
        launch(self, kernel, *arguments, **flags)

    monkeypatch.setattr(kernels.Launches, "_launch", counted)
    monkeypatch.setitem(sys.modules, NAME, kernels)
    monkeypatch.setattr(package, "triton", kernels)
    monkeypatch.setattr(self_modifying, "use_triton", lambda device: True)
    return started


def banks_of(rule: SelfModRule, adaptive: tuple[str, ...], size: int) -> tuple[Bank, ...]:
    banks = (Bank(("memory",), size), Bank(adaptive, size, rule.projection_steps(size)))
    return banks[: 1 + bool(adaptive)]


def difference(
    kernels: ModuleType, rule: SelfModRule, banks: tuple[Bank, ...], inputs: list[Tensor]
) -> float:
    """Largest difference of answers, weights and gradients from those of `chunk.py` in float64."""
    found = kernels.outcomes(rule, banks, inputs, True), kernels.outcomes(rule, banks, inputs, False)
    assert len(found[0]) == len(kernels.RESULTS)
    pairs = zip(*found, strict=True)
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-9)) for a, b in pairs)


@pytest.mark.parametrize(
    "name", ["default", *(pytest.param(name, marks=pytest.mark.thorough) for name in list(RULES)[1:])]
)
def test_every_rule_equals_the_other_implementation(kernels: ModuleType, name: str) -> None:
    rule, adaptive = RULES[name]
    _, _, inputs = kernels.example(16, 16, adaptive, CPU, torch.float32, 1, 2)
    assert difference(kernels, rule, banks_of(rule, adaptive, 16), inputs) < EXACT


@pytest.mark.thorough
@pytest.mark.parametrize(("width", "size"), [(64, 64), (32, 128), (128, 32)])
def test_every_size_equals_the_other_implementation(kernels: ModuleType, width: int, size: int) -> None:
    rule, banks, inputs = kernels.example(width, size, ("k", "v", "eta", "alpha"), CPU, torch.float32, 1, 2)
    assert difference(kernels, rule, banks, inputs) < EXACT


@pytest.mark.thorough
def test_weights_are_run_forward_again_from_every_stored_start(
    kernels: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "EVERY", 2)  # three chunks: a whole segment and half of one
    rule, banks, inputs = kernels.example(16, 16, ("k",), CPU, torch.float32)
    assert difference(kernels, rule, banks, inputs) < EXACT


@pytest.mark.thorough
def test_bfloat16_inputs(kernels: ModuleType) -> None:
    rule, banks, inputs = kernels.example(16, 16, ("k", "eta"), CPU, torch.bfloat16, 1, 2)
    assert difference(kernels, rule, banks, inputs) < EXACT  # they are widened first


@pytest.mark.thorough
def test_the_comparison_finds_a_wrong_gradient(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "COMPARED", ((16, 16),))
    assert max(kernels.KERNEL.compare(CPU, torch.float32).values()) < EXACT
    back = kernels.Launches.back

    def forgetful(self: Any, starts: Any, grad_y: Tensor, *rest: Tensor) -> Any:
        return back(self, starts, 0 * grad_y, *rest)

    monkeypatch.setattr(kernels.Launches, "back", forgetful)
    assert max(kernels.KERNEL.compare(CPU, torch.float32).values()) > 0.1


@pytest.mark.thorough
def test_second_gradients(kernels: ModuleType) -> None:
    """Through the gradient of the kernels as through that of `chunk.py`."""
    rule, banks, inputs = kernels.example(16, 16, ("k", "eta"), CPU, torch.float32, 1, 2)

    def second(wide: torch.dtype) -> Tensor:
        x, rates, w2, w1 = (t.to(wide).requires_grad_() for t in inputs)
        at = kernels.SelfModProgress(kernels.split(banks, w2, w1), None, 0)
        streams = kernels.Streams(*x, rates)
        if wide == torch.float32:
            y, _ = kernels.read_and_write(rule, banks, at, streams)
        else:
            y, _ = kernels.chunk.read_and_write(rule, banks, "chunk", kernels.run_eager, at, streams)
        (first,) = torch.autograd.grad(y.square().sum(), rates, create_graph=True)
        return torch.autograd.grad(first.square().sum(), w2)[0].double()

    found, exact = second(torch.float32), second(torch.float64)
    assert float((found - exact).abs().max() / exact.abs().max()) < 1e-4


def layer(kind: type[SelfModifyingTitans] = SelfModifyingTitans, **options: Any) -> SelfModifyingTitans:
    torch.manual_seed(0)
    made = kind(32, 2, 16, config=MemoryConfig(**options))
    torch.nn.init.normal_(made.rates.weight, std=0.5)
    return made


def run(made: SelfModifyingTitans, lengths: tuple[int, ...]) -> list[Tensor]:
    """Answers to a sequence in calls of these lengths, the last state, and gradients of all parameters."""
    made.zero_grad()
    x = torch.randn(2, sum(lengths), 32, generator=torch.Generator().manual_seed(1), requires_grad=True)
    answers, state = [], None
    for part in x.split(lengths, 1):
        y, state = made(part, state)
        answers.append(y)
    whole = torch.cat(answers, 1)
    assert state is not None
    held = list(state.tensors())
    (whole.square().sum() + sum(t.square().sum() for t in held)).backward()
    return [whole, *held, x.grad, *(p.grad for p in made.parameters())]  # type: ignore[list-item]


@pytest.mark.parametrize(
    "kind", [pytest.param(SelfModifyingTitans, marks=pytest.mark.thorough), TitansMemory]
)
def test_a_layer_on_kernels_equals_itself_without(
    kind: type[SelfModifyingTitans], launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one call and in calls that start and end inside of chunks."""
    made = layer(kind, **({"adaptive": ("k", "eta")} if kind is SelfModifyingTitans else {}))
    found = [run(made, lengths) for lengths in ((35,), (5, 30))]
    assert launched.count("backward") == (2 + 1) + (1 + 1)  # whole chunks, and one for the first projection
    monkeypatch.setattr(self_modifying, "use_triton", lambda device: False)
    exact = run(made, (35,))
    for one in found:
        for a, b in zip(one, exact, strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=2e-5 * float(b.detach().abs().max()))


@pytest.mark.parametrize(
    "options",
    [
        {"momentum": True},
        {"delta": False},
        {"retention_target": "init"},
        {"error_limit": 1.0},
        {"hidden": 32},
        {"projection_chunk_size": 32},
    ],
)
def test_what_the_kernels_lack_runs_without(options: dict[str, Any], launched: list[str]) -> None:
    made = layer(**options)
    made(torch.randn(1, 40, 32))
    assert not launched


def test_launches_per_chunk(launched: list[str]) -> None:
    """One per chunk forward and two backward, and three beside them in all."""
    for chunks in (1, 3):
        launched.clear()
        y, _ = layer(adaptive=())(torch.randn(1, 16 * chunks, 32))
        assert launched.count("forward") == chunks + 1 and "backward" not in launched
        y.sum().backward()
        assert launched.count("forward") - (chunks + 1) == chunks and launched.count("backward") == chunks + 1


def signature(kernel: Any, constants: dict[str, Any]) -> dict[str, str]:
    numbers = {**dict.fromkeys(VARYING, "i32"), "limit": "fp32", "steps": "fp32"}
    types = {**numbers, **dict.fromkeys(constants, "constexpr")}
    return {name: types.get(name, "*fp32") for name in kernel.arg_names}


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(("width", "size"), [(16, 16), (32, 32), (64, 64)])
def test_compiled_kernels_do_not_spill(width: int, size: int, arch: int) -> None:
    rule = SelfModRule()
    banks = (Bank(("memory",), size), Bank(("k", "v", "eta", "alpha"), size, 0.1))
    fixed = compiled.constants(compiled.Layout.of(rule, banks), width, "tf32x3")
    for kernel, more in ((forward, {}), (backward, {"STOP": False})):
        constants = {**fixed, **more}
        found = usage(kernel, signature(kernel, constants), constants, arch, compiled.warps(width))
        assert found.spilled == 0 and found.shared <= SHARED[arch], (kernel.fn.__name__, found)


def test_the_layout_of_a_layer() -> None:
    made = layer()
    found = compiled.Layout.of(made.config, made.layout)
    assert found.names == ("memory", "k", "v", "eta", "alpha") and (found.full, found.slow) == (3, 1)
    assert found.steps == 2 / 16 and found.limit == 1.0
    assert compiled.Layout.of(replace(made.config), made.layout[:1]).slow == 1
