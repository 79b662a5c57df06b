"""The kernels of self-modifying Titans: against the other implementation, in layers, compiled for cards."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from interpreter import interpreted
from on_kernels import assert_same, install, run
from ptx import SHARED, usage
from torch import Tensor

from nested_learning.layers import self_modifying
from nested_learning.layers.config import MemoryConfig
from nested_learning.layers.self_modifying import SelfModifyingTitans, TitansMemory
from nested_learning.ops import kernels as switch
from nested_learning.ops import self_modifying as package
from nested_learning.ops.self_modifying import triton as compiled
from nested_learning.ops.self_modifying.backward import backward
from nested_learning.ops.self_modifying.chunk import SelfModRule
from nested_learning.ops.self_modifying.forward import VARYING, forward

CPU = torch.device("cpu")
NAME = "nested_learning.ops.self_modifying.triton"
EXACT = 1e-5  # in float32, of the largest entry
RULES = {
    "default": SelfModRule(),
    "all adaptive": SelfModRule(adaptive=("k", "v", "q", "eta", "alpha")),
    "slow targets": SelfModRule(adaptive=("k", "alpha"), self_targets=False),
    "targets without gradient": SelfModRule(adaptive=("v", "eta"), stop_gradient_targets=True),
    "no retention": SelfModRule(adaptive=("k", "eta"), retention=False),
    "steps up to 2, bounded by retention": SelfModRule(adaptive=("q", "eta", "alpha"), eta_max=2.0),
    "steps up to 2, not bounded": SelfModRule(adaptive=("v",), eta_max=2.0, step_control="none"),
    "Titans": SelfModRule(adaptive=(), self_targets=False),
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
    monkeypatch.setattr(kernels, "right", lambda *arguments: True)
    install(kernels, package, self_modifying, monkeypatch)
    return started


def difference(
    kernels: ModuleType, rule: SelfModRule, width: int = 16, size: int = 16, chunks: int = 2
) -> float:
    """Largest difference of answers, weights and gradients from those of `chunk.py` in float64."""
    banks = kernels.banks_of(rule, size)
    inputs = kernels.example(banks, width, CPU, torch.float32, 1, chunks)
    return max(kernels.differences(rule, banks, inputs, "tf32x3").values())


@pytest.mark.parametrize(
    "name", ["default", *(pytest.param(name, marks=pytest.mark.thorough) for name in list(RULES)[1:])]
)
def test_every_rule_equals_the_other_implementation(kernels: ModuleType, name: str) -> None:
    assert difference(kernels, RULES[name]) < EXACT


@pytest.mark.thorough
@pytest.mark.parametrize(("width", "size"), [(64, 64), (32, 128), (128, 32)])
def test_every_size_equals_the_other_implementation(kernels: ModuleType, width: int, size: int) -> None:
    assert difference(kernels, SelfModRule(), width, size) < EXACT


@pytest.mark.parametrize("size", [16, pytest.param(64, marks=pytest.mark.thorough)])
def test_products_in_bfloat16(kernels: ModuleType, size: int) -> None:
    rule = SelfModRule(adaptive=("k", "eta"))
    banks = kernels.banks_of(rule, size)
    found = kernels.differences(rule, banks, kernels.example(banks, size, CPU, torch.float32, 1, 2), "bf16")
    assert 1e-4 < max(found.values()) < 4e-2


@pytest.mark.thorough
def test_bfloat16_inputs(kernels: ModuleType) -> None:
    rule = SelfModRule(adaptive=("k", "eta"))
    banks = kernels.banks_of(rule, 16)
    inputs = kernels.example(banks, 16, CPU, torch.bfloat16, 1, 2)
    assert max(kernels.differences(rule, banks, inputs, "tf32x3").values()) < EXACT  # they are widened first


@pytest.mark.thorough
def test_the_comparison_finds_a_wrong_gradient(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "COMPARED", ((16, 16),))
    assert max(kernels.KERNEL.compare(CPU, torch.float32).values()) < EXACT
    back = kernels.Launches.back

    def forgetful(self: Any, starts: Any, every: int, grad_y: Tensor, *rest: Tensor) -> Any:
        return back(self, starts, every, 0 * grad_y, *rest)

    monkeypatch.setattr(kernels.Launches, "back", forgetful)
    assert max(kernels.KERNEL.compare(CPU, torch.float32).values()) > 0.1


@pytest.mark.thorough
def test_second_gradients(kernels: ModuleType) -> None:
    """Through the gradient of the kernels as through that of `chunk.py`."""
    rule = SelfModRule(adaptive=("k", "eta"))
    banks = kernels.banks_of(rule, 16)
    inputs = kernels.example(banks, 16, CPU, torch.float32, 1, 2)

    def second(wide: torch.dtype) -> Tensor:
        x, rates, w2, w1 = (t.to(wide).requires_grad_() for t in inputs)
        at = kernels.SelfModProgress(kernels.split(banks, w2, w1), None, 0)
        streams = kernels.Streams(*x, rates)
        if wide == torch.float32:
            y, _ = kernels.read_and_write(rule, banks, at, streams, "tf32x3")
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
        assert_same(one, exact)


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


@pytest.mark.parametrize("wrong", [False, True])
def test_a_layer_tries_its_kernels_and_leaves_wrong_ones_out(
    wrong: bool, kernels: ModuleType, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    """Once, at the first use, also without gradients and in inference mode."""
    install(kernels, package, self_modifying, monkeypatch)
    monkeypatch.setattr(switch, "_right", {})
    back, tried = kernels.Launches.back, []

    def counted(self: Any, starts: Any, every: int, grad_y: Tensor, *rest: Tensor) -> Any:
        tried.append(self)
        return back(self, starts, every, 0 * grad_y if wrong else grad_y, *rest)

    monkeypatch.setattr(kernels.Launches, "back", counted)
    made, x = layer(adaptive=()), torch.randn(1, 16, 32)
    with torch.inference_mode():
        first, _ = made(x)
    second, _ = made(x)
    assert len(tried) == 1 and torch.allclose(first, second)
    texts = [str(one.message) for one in recwarn if one.category is RuntimeWarning]
    assert sum(text.startswith("wrong Triton kernels are left out") for text in texts) == wrong
    with switch.kernels("triton"):
        if wrong:
            with pytest.raises(RuntimeError, match="are wrong on this card"):
                made(x)
        else:
            made(x)


def test_launches_per_chunk(launched: list[str]) -> None:
    """One in each direction, and one beside these for the first chunk's projections."""
    for chunks in (1, 3):
        launched.clear()
        y, _ = layer(adaptive=())(torch.randn(1, 16 * chunks, 32))
        assert launched == ["forward"] * (chunks + 1)
        y.sum().backward()
        assert launched == ["forward"] * (chunks + 1) + ["backward"] * (chunks + 1)


def test_chunks_between_stored_starts_are_run_forward_again(launched: list[str]) -> None:
    """Three chunks: a whole segment of two, and half of one."""
    found = []
    for keep_every, again in ((None, 0), (1, 0), (2, 1), (8, 2)):
        launched.clear()
        found.append(run(layer(adaptive=("k",), keep_every=keep_every), (48,)))
        assert launched.count("forward") == 4 + again and launched.count("backward") == 4
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


def test_nothing_is_stored_where_no_gradient_is_asked_for(
    launched: list[str], kernels: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored: list[int] = []
    read = kernels.Launches.read

    def noted(self: Any, *arguments: Any) -> Any:
        y, starts, after = read(self, *arguments)
        stored.append(len(starts))
        return y, starts, after

    monkeypatch.setattr(kernels.Launches, "read", noted)
    made, x = layer(adaptive=()), torch.randn(1, 32, 32)
    made(x)
    with torch.no_grad():
        made(x)
    assert stored == [2, 0]


def signature(kernel: Any, constants: dict[str, Any]) -> dict[str, str]:
    numbers = {**dict.fromkeys(VARYING, "i32"), "limit": "fp32", "steps": "fp32"}
    scratch = {"scratch": "*bf16" if constants["P"] == "bf16" else "*fp32"}
    types = {**numbers, **scratch, **dict.fromkeys(constants, "constexpr")}
    return {name: types.get(name, "*fp32") for name in kernel.arg_names}


SPILLED = 200
"""Bytes of a thread that may spill, beside the 1,020 in its registers."""
SPILLED_MOST = {("bf16", 64, 90): 350}
"""The same where 64 rows are held at a time."""


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("products", ["bf16", "tf32x3"])
@pytest.mark.parametrize(("width", "size"), [(16, 16), (32, 32), (64, 64)])
def test_compiled_kernels_hardly_spill(width: int, size: int, products: str, arch: int) -> None:
    rule = SelfModRule()
    layout = compiled.Layout.of(rule, compiled.banks_of(rule, size))
    fixed = compiled.constants(layout, width, products, arch // 10)
    for kernel, more in ((forward, {}), (backward, {"STOP": False})):
        constants = {**fixed, **more}
        warps = compiled.warps(layout, width, products)
        found = usage(kernel, signature(kernel, constants), constants, arch, warps)
        spilled = SPILLED_MOST.get((products, size, arch), SPILLED)
        assert found.spilled <= spilled and found.shared <= SHARED[arch], (kernel.fn.__name__, found)


def test_the_layout_of_a_layer() -> None:
    made = layer()
    found = compiled.Layout.of(made.config, made.layout)
    assert found.names == ("memory", "k", "v", "eta", "alpha") and (found.full, found.slow) == (3, 1)
    assert found.steps == 2 / 16 and found.limit == 1.0
    assert compiled.Layout.of(replace(made.config), made.layout[:1]).slow == 1
