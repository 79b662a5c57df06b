"""The scan of the gated delta rule: against its token loop, in a layer, and compiled for cards."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from interpreter import interpreted
from ptx import SHARED, usage
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nested_learning.layers import linear
from nested_learning.layers.config import Around, MemoryConfig
from nested_learning.layers.linear import GatedDeltaRule, LinearState
from nested_learning.ops import delta_rule
from nested_learning.ops.delta_rule import naive
from nested_learning.ops.delta_rule import triton as compiled
from nested_learning.ops.delta_rule.chunk import LinearMemory, LinearPiece

CPU = torch.device("cpu")
NAME = "nested_learning.ops.delta_rule.triton"
EXACT = 1e-5  # in float32, of the largest entry
ROUNDED = 2**-8  # one rounding to bfloat16 of a gradient, and as much again


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    return interpreted(NAME)


@pytest.fixture
def on_kernels(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Layers run on the interpreted kernel. The list gets the number of chunks of every launch."""
    launched: list[int] = []
    launch = kernels.launch

    def counted(keep: Tensor, *rest: Any) -> Tensor:
        launched.append(keep.shape[1])
        return launch(keep, *rest)

    monkeypatch.setattr(kernels, "launch", counted)
    monkeypatch.setitem(sys.modules, NAME, kernels)
    monkeypatch.setattr(delta_rule, "triton", kernels)
    monkeypatch.setattr(linear, "use_triton", lambda device: True)
    monkeypatch.setattr(kernels, "right", lambda *arguments: True)
    return launched


def random_inputs(width: int, out: int, length: int) -> list[Tensor]:
    """q, k, v, η, log α and W of three sequences; keys of unit norm that resemble each other."""
    generator = torch.Generator().manual_seed(length)
    q, k = torch.randn(2, 3, length, width, generator=generator) + 0.5
    v = torch.randn(3, length, out, generator=generator)
    eta, log_alpha = (
        torch.rand(3, length, generator=generator),
        -0.3 * torch.rand(3, length, generator=generator),
    )
    log_alpha[0] = 0.0  # the first sequence forgets nothing
    k = k / k.norm(dim=-1, keepdim=True)
    return [q, k, v, eta, log_alpha, torch.randn(3, out, width, generator=generator)]


def with_gradients(outputs: tuple[Tensor, Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """The outputs, and the gradients of their sum of squares at the inputs."""
    loss = sum(y.double().square().sum() for y in outputs)
    assert isinstance(loss, Tensor)
    return [y.detach() for y in outputs] + list(torch.autograd.grad(loss, inputs))


@pytest.mark.parametrize(
    ("width", "out", "chunk", "length"),
    [(16, 16, 16, 40), (32, 16, 64, 65), (64, 48, 16, 16), (24, 40, 32, 70), (128, 20, 128, 131)],
)
def test_outputs_state_and_gradients_equal_the_token_loop(
    kernels: ModuleType, width: int, out: int, chunk: int, length: int
) -> None:
    inputs = [t.requires_grad_() for t in random_inputs(width, out, length)]
    *tokens, weights = inputs
    y, after = kernels.read_and_write(chunk, LinearMemory(weights), LinearPiece(*tokens, None))
    found = with_gradients((y, after.weights), inputs)

    exact = [t.detach().double().requires_grad_() for t in inputs]
    q, k, v, eta, log_alpha, weights = exact
    rates = (eta, log_alpha.exp(), None)
    y, last, _ = naive.delta_rule(
        q, k, v, rates, weights, chunk_size=chunk, objective="dot", read="after_write"
    )
    for one, other in zip(found, with_gradients((y, last), exact), strict=True):
        assert one.shape == other.shape and one.dtype == torch.float32
        assert float((one - other).abs().max()) <= EXACT * float(other.abs().max())


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, EXACT), (torch.bfloat16, ROUNDED)])
def test_the_comparison_that_runs_on_cards_finds_no_difference(
    kernels: ModuleType, dtype: torch.dtype, bound: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "SIZES", ((32, 16),))
    assert kernels.KERNEL.name == "delta_rule"
    found = kernels.KERNEL.compare(CPU, dtype)
    assert len(found) == 8 and max(found.values()) <= bound


def test_the_comparison_finds_a_wrong_gradient(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    launch = kernels.launch

    def forgetful(keep: Tensor, turn: Tensor, added: Tensor, backwards: bool) -> Tensor:
        return launch(keep, turn.mT.contiguous() if backwards else turn, added, backwards)

    monkeypatch.setattr(kernels, "SIZES", ((16, 16),))
    monkeypatch.setattr(kernels, "launch", forgetful)
    found = kernels.KERNEL.compare(CPU, torch.float32)
    assert found["answers, width 16"] <= EXACT and found["keys, width 16"] > 0.01


def test_the_scan_is_differentiable_twice(kernels: ModuleType) -> None:
    generator = torch.Generator().manual_seed(0)
    keep, turn, added = (
        torch.randn(shape, generator=generator).mul(0.3).requires_grad_()
        for shape in [(1, 3), (1, 3, 4, 4), (1, 4, 2, 4)]
    )

    def states(keep: Tensor, turn: Tensor, added: Tensor) -> Tensor:
        return kernels._States.apply(keep, turn, added, False)

    def loop(keep: Tensor, turn: Tensor, added: Tensor) -> Tensor:
        x = [added[:, 0]]
        for m in range(3):
            x.append(x[m] * keep[:, m, None, None] + x[m] @ turn[:, m] + added[:, m + 1])
        return torch.stack(x, 1)

    def second(function: Any) -> tuple[Tensor, ...]:
        inputs = (keep, turn, added)
        first = torch.autograd.grad(function(*inputs).square().sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), inputs)

    for one, other in zip(second(states), second(loop), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))


def make(**switches: Any) -> GatedDeltaRule:
    torch.manual_seed(0)
    layer = GatedDeltaRule(32, 2, 16, MemoryConfig(eta_bias=0.0, alpha_bias=1.0, **switches), Around())
    with torch.no_grad():
        layer.rates.weight.normal_()
    return layer


def run(layer: GatedDeltaRule, x: Tensor, cuts: list[int]) -> list[Tensor]:
    """Outputs, the last weights, and all gradients, of calls that end at the cuts."""
    x = x.detach().requires_grad_()
    state: LinearState | None = None
    parts = []
    for piece in x.tensor_split(cuts, 1):
        y, state = layer(piece, state)
        parts.append(y)
    assert state is not None
    return with_gradients((torch.cat(parts, 1), state.weights), [x, *layer.parameters()])


@pytest.mark.parametrize("switches", [{}, {"keep_every": 1}, {"retention": False}])
def test_a_layer_on_the_kernel_equals_one_on_pytorch_also_in_two_calls(
    switches: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    layer, x = make(**switches), torch.randn(2, 45, 32, generator=torch.Generator().manual_seed(1))
    expected = run(layer, x, [])
    launched = request.getfixturevalue("on_kernels")
    for cuts, chunks in ([], [3, 3]), ([20], [2, 2, 2, 2]):
        launched.clear()
        for one, other in zip(run(layer, x, cuts), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=EXACT * float(other.abs().max()))
        again = len(chunks) // 2 if "keep_every" in switches else 0
        assert launched == chunks + chunks[:again]


def test_the_last_state_is_no_view_of_all_of_them(kernels: ModuleType) -> None:
    *tokens, weights = random_inputs(16, 16, 40)
    _, after = kernels.read_and_write(
        16, LinearMemory(weights[:1]), LinearPiece(*(t[:1] for t in tokens), None)
    )
    assert after.weights.untyped_storage().nbytes() == 4 * after.weights.numel()


@pytest.mark.parametrize("switches", [{"momentum": True}, {"delta": False}])
def test_other_rules_stay_on_pytorch(switches: dict[str, Any], on_kernels: list[int]) -> None:
    layer, x = make(**switches), torch.randn(1, 40, 32)
    assert run(layer, x, [])[0].shape == x.shape
    assert on_kernels == []


def test_one_chunk_and_double_precision_stay_on_pytorch(on_kernels: list[int]) -> None:
    layer = make()
    layer(torch.randn(1, 16, 32))
    layer.double()(torch.randn(1, 40, 32, dtype=torch.float64))
    assert on_kernels == []


def test_the_layer_takes_pytorch_where_triton_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "read_and_write", None)
    layer, x = make(), torch.randn(1, 40, 32)
    assert layer(x)[0].shape == x.shape


EMPTY = torch.zeros(1, 4, 4)


@pytest.mark.parametrize(
    "changed",
    [
        {"objective": "l2"},
        {"read": "before_write"},
        {"delta": False},
        {"chunk_size": 8},
        {"at": LinearMemory(EMPTY, EMPTY)},
        {"at": LinearMemory(EMPTY, None, EMPTY)},
        {"at": LinearMemory(torch.zeros(1, 4, 130))},
        {"at": LinearMemory(EMPTY.double())},
    ],
)
def test_what_the_kernel_does_not_support(changed: dict[str, Any]) -> None:
    rule: dict[str, Any] = {"objective": "dot", "read": "after_write", "delta": True}
    rule |= {"at": LinearMemory(torch.zeros(1, 128, 16)), "chunk_size": 64}
    assert compiled.supports(**rule) and not compiled.supports(**(rule | changed))


class Operations(TorchDispatchMode):
    """Counts PyTorch's operations."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_the_number_of_kernels_does_not_depend_on_the_number_of_chunks(
    kernels: ModuleType, on_kernels: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    launch = kernels.launch

    def uncounted(*arguments: Any) -> Tensor:  # the interpreter computes with PyTorch's operations, too
        before = operations.count
        states = launch(*arguments)
        operations.count = before
        return states

    monkeypatch.setattr(kernels, "launch", uncounted)
    layer, counts = make(), []
    for chunks in (2, 7):
        on_kernels.clear()
        with Operations() as operations:
            run(layer, torch.randn(1, 16 * chunks, 32), [])
        assert on_kernels == [chunks, chunks]  # forward and backward
        counts.append(operations.count)
    assert counts[0] == counts[1] > 0


def test_tf32_only_where_products_of_pytorch_may_use_it(
    kernels: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    constants = kernels.constants

    def noted(rows: int, width: int, backwards: bool, precision: str) -> dict[str, Any]:
        asked.append(precision)
        return constants(rows, width, backwards, precision)

    monkeypatch.setattr(kernels, "constants", noted)
    for allowed in ("ieee", "tf32"):
        monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(fp32_precision=allowed))
        kernels.launch(torch.zeros(1, 1), torch.zeros(1, 1, 4, 4), torch.zeros(1, 2, 4, 4), False)
    assert asked == ["tf32x3", "tf32"]


POINTERS = {"states": "*fp32", "added": "*fp32", "turn": "*fp32", "keep": "*fp32", "chunks": "i32"}
TARGETS = [(arch, width) for arch in SHARED for width in (16, 64, 128)]


@pytest.mark.parametrize("precision", ["tf32x3", pytest.param("tf32", marks=pytest.mark.thorough)])
@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize(("arch", "width"), TARGETS)
def test_the_kernel_compiles_for_cards_without_spilling(
    arch: int, width: int, backwards: bool, precision: str
) -> None:
    """The chunk is no size of the kernel: it only sees W before and after."""
    constants = compiled.constants(width, width, backwards, precision)
    signature = POINTERS | dict.fromkeys(constants, "constexpr")
    used = usage(compiled.scan_states, signature, constants, arch, compiled.warps(width))
    assert used.spilled == 0 and used.registers <= 255 and used.shared <= SHARED[arch]
