"""The kernels of fast levels: against PyTorch's path, in layers, compiled for cards."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from interpreter import interpreted
from on_kernels import assert_same, install, run
from ptx import SHARED, usage
from torch import Tensor

from nested_learning.layers import cms as layers
from nested_learning.layers.cms import CMS, FastLevel
from nested_learning.layers.config import MemoryConfig
from nested_learning.levels import LevelSpec
from nested_learning.ops import cms as package
from nested_learning.ops import kernels as switch
from nested_learning.ops.cms import backward, forward
from nested_learning.ops.cms import triton as compiled

CPU = torch.device("cpu")
NAME = "nested_learning.ops.cms.triton"
EXACT = 1e-5  # in float32, of the largest entry
KERNELS = (
    *(forward.hidden_layer, forward.answers, forward.hidden_errors, forward.update),
    *(backward.through_update, backward.through_errors, backward.through_hidden, backward.start_gradients),
)


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    return interpreted(NAME)


@pytest.fixture
def launched(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Levels run on the interpreted kernels. The list gets the name of every kernel that is started."""
    started: list[str] = []
    launch = kernels.Launches._launch

    def counted(self: Any, fixed: Any, chunk: int, kernel: Any, *arguments: Any) -> None:
        started.append(kernel.fn.__name__)
        launch(self, fixed, chunk, kernel, *arguments)

    monkeypatch.setattr(kernels.Launches, "_launch", counted)
    monkeypatch.setattr(kernels, "right", lambda *arguments: True)
    install(kernels, package, layers, monkeypatch)
    return started


@pytest.mark.parametrize(
    ("size", "hidden", "width"),
    [
        (16, 16, 32),
        pytest.param(32, 48, 32, marks=pytest.mark.thorough),  # the hidden layer is no power of two
        pytest.param(16, 32, 96, marks=pytest.mark.thorough),  # nor is the width
        pytest.param(64, 16, 64, marks=pytest.mark.thorough),
        pytest.param(128, 32, 16, marks=pytest.mark.thorough),
    ],
)
def test_every_size_equals_the_other_implementation(
    kernels: ModuleType, size: int, hidden: int, width: int
) -> None:
    inputs = kernels.example(size, hidden, width, CPU, torch.float32)
    assert max(kernels.differences(inputs, "tf32x3").values()) < EXACT


def test_products_in_bfloat16(kernels: ModuleType) -> None:
    found = kernels.differences(kernels.example(16, 16, 32, CPU, torch.float32), "bf16")
    assert 1e-4 < max(found.values()) < 4e-2


@pytest.mark.thorough
def test_the_comparison_finds_a_wrong_gradient(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "COMPARED", ((16, 16, 32),))
    assert max(kernels.KERNEL.compare(CPU, torch.float32).values()) < EXACT
    rest = kernels.Launches._rest

    def forgetful(self: Any, *arguments: Any) -> tuple[Tensor, ...]:
        *most, at_w1 = rest(self, *arguments)
        return *most, 0.9 * at_w1

    monkeypatch.setattr(kernels.Launches, "_rest", forgetful)
    assert max(kernels.KERNEL.compare(CPU, torch.float32).values()) > 0.05


@pytest.mark.thorough
def test_second_gradients(kernels: ModuleType) -> None:
    """Through the gradient of the kernels as through that of PyTorch's path."""
    inputs = kernels.example(16, 16, 32, CPU, torch.float32)

    def second(wide: torch.dtype) -> Tensor:
        own = [t.to(wide).requires_grad_() for t in inputs]
        ours = wide == torch.float32
        w2, w1 = kernels._scan("tf32x3", *own) if ours else kernels.by_torch(*own)
        (first,) = torch.autograd.grad(w2.square().sum() + w1.square().sum(), own[2], create_graph=True)
        return torch.autograd.grad(first.square().sum(), own[4])[0].double()

    found, exact = second(torch.float32), second(torch.float64)
    assert float((found - exact).abs().max() / exact.abs().max()) < 1e-4


def level(chunk: int = 16, memory: dict[str, Any] | None = None, **options: Any) -> FastLevel:
    torch.manual_seed(0)
    spec = LevelSpec(name="fast", chunk_size=chunk, expansion=0.5, **options)
    made = FastLevel(32, spec, MemoryConfig(**(memory or {})))
    if made.rates is not None:
        torch.nn.init.normal_(made.rates.weight, std=0.5)
    return made


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"key": "projected", "target": "same"}, marks=pytest.mark.thorough),
        pytest.param({"memory": {"retention": False}, "eta": 0.1}, marks=pytest.mark.thorough),
    ],
)
def test_a_level_on_kernels_equals_itself_without(
    options: dict[str, Any], launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one call, and in calls that start and end inside of chunks."""
    made = level(**options)
    found = [run(made, lengths) for lengths in ((51,), (5, 46))]
    assert launched.count("start_gradients") == 3 + 2  # whole chunks
    launched.clear()
    monkeypatch.setattr(layers, "use_triton", lambda device: False)
    exact = run(made, (51,))
    assert not launched
    for one in found:
        assert_same(one, exact)


def test_without_gradients_a_few_chunks_are_held_at_a_time(
    launched: list[str], kernels: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, x = level(), torch.randn(2, 16 * 5, 32)
    y, state = made(x)
    held: list[int] = []
    prepared = kernels._prepared
    monkeypatch.setattr(
        kernels, "_prepared", lambda *tokens: held.append(len(tokens[0])) or prepared(*tokens)
    )
    monkeypatch.setattr(kernels, "AT_ONCE", 2)
    with torch.no_grad():
        found, after = made(x)
    assert held == [2, 2, 1]
    assert_same([found, *after.tensors()], [y.detach(), *(t.detach() for t in state.tensors())])


@pytest.mark.parametrize(
    "memory", [{"momentum": True}, {"delta": False}, {"retention_target": "init"}, {"error_limit": 1.0}]
)
def test_what_the_kernels_lack_runs_without(memory: dict[str, Any], launched: list[str]) -> None:
    level(memory=memory)(torch.randn(1, 40, 32))
    assert not launched


def test_contexts_that_start_anew_are_written_side_by_side(
    launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three chunks of a context the last is not written; its contexts are as many sequences."""
    torch.manual_seed(0)
    specs = [LevelSpec(name="fast", chunk_size=16, expansion=0.5), LevelSpec(name="slower", chunk_size=48)]
    made = CMS(32, specs, "nested")
    found = run(made, (150,))
    assert launched.count("update") == 2  # where the slower level has a chunk of 48 tokens, it has no kernel
    monkeypatch.setattr(layers, "use_triton", lambda device: False)
    assert_same(found, run(made, (150,)))


@pytest.mark.parametrize("wrong", [False, True])
def test_a_level_tries_its_kernels_and_leaves_wrong_ones_out(
    wrong: bool, kernels: ModuleType, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    """Once, at the first use, also without gradients."""
    install(kernels, package, layers, monkeypatch)
    monkeypatch.setattr(switch, "_right", {})
    rest, tried = kernels.Launches._rest, []

    def counted(self: Any, *arguments: Any) -> tuple[Tensor, ...]:
        tried.append(self)
        *most, at_w1 = rest(self, *arguments)
        return *most, (0 if wrong else 1) * at_w1

    monkeypatch.setattr(kernels.Launches, "_rest", counted)
    made, x = level(), torch.randn(1, 16, 32)
    with torch.inference_mode():
        first, _ = made(x)
    second, _ = made(x)
    assert len(tried) == 1 and torch.allclose(first, second)
    texts = [str(one.message) for one in recwarn if one.category is RuntimeWarning]
    assert sum(text.startswith("wrong Triton kernels are left out") for text in texts) == wrong


def test_launches_per_chunk(launched: list[str]) -> None:
    """Four forward and four backward."""
    for chunks in (1, 3):
        launched.clear()
        y, _ = level()(torch.randn(1, 16 * chunks, 32))
        assert len(launched) == 4 * chunks
        y.sum().backward()
        assert len(launched) == 8 * chunks


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("products", ["bf16", "tf32x3"])
@pytest.mark.parametrize(
    ("size", "hidden", "width", "most"),
    [(16, 64, 256, 0), (32, 192, 768, 0), (128, 192, 768, 0), (64, 448, 1792, 400)],
)
def test_compiled_kernels_hardly_spill(
    size: int, hidden: int, width: int, most: int, products: str, arch: int
) -> None:
    """Up to the sizes of `pilot` not at all; `most`: bytes of a thread, beside the 512 in its registers."""
    fixed = compiled.constants(size, width, hidden, products)
    for kernel in KERNELS:
        own = {name: fixed[name] for name in kernel.arg_names if name in fixed}
        types = {**dict.fromkeys(forward.VARYING, "i32"), **dict.fromkeys(own, "constexpr")}
        signature = {name: types.get(name, "*fp32") for name in kernel.arg_names}
        found = usage(kernel, signature, own, arch, compiled.warps(kernel, fixed), compiled.STAGES)
        assert found.spilled <= most and found.shared <= SHARED[arch], (kernel.fn.__name__, found)
