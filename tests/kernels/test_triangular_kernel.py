"""The kernel that inverts unit lower triangles: against LAPACK, in fast levels, and compiled for cards."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from interpreter import interpreted
from ptx import SHARED, usage
from torch import Tensor
from torch.nn import functional as F

from nested_learning.layers.cms import FastLevel
from nested_learning.layers.config import MemoryConfig
from nested_learning.levels import LevelSpec
from nested_learning.ops import kernels as switch
from nested_learning.ops import triangular as package
from nested_learning.ops.triangular import inverse
from nested_learning.ops.triangular import triton as compiled

CPU = torch.device("cpu")
NAME = "nested_learning.ops.triangular.triton"
EXACT = 1e-5  # in float32, of the largest entry


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    return interpreted(NAME)


@pytest.fixture
def launched(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Inverses are those of the interpreted kernel. The list gets the number of matrices of every launch."""
    started: list[int] = []
    invert = kernels.invert

    def counted(strict: Tensor) -> Tensor:
        started.append(len(strict))
        return invert(strict)

    monkeypatch.setattr(kernels, "invert", counted)
    monkeypatch.setattr(kernels, "right", lambda *arguments: True)
    monkeypatch.setitem(sys.modules, NAME, kernels)
    monkeypatch.setattr(package, "triton", kernels)
    monkeypatch.setattr(switch, "why_no_triton", torch.compiler.assume_constant_result(lambda device: None))
    return started


def system(size: int, noise: float, eta: float) -> Tensor:
    """Three matrices of the delta rule in float64: keys that differ by `noise`."""
    generator = torch.Generator().manual_seed(size)
    random = torch.randn(3, size, 24, generator=generator, dtype=torch.float64)
    keys = F.normalize(1 + noise * random, dim=-1)
    return (eta * keys @ keys.mT).tril(-1)


def exact(strict: Tensor) -> Tensor:
    """(I + N)⁻¹ by LAPACK."""
    return torch.linalg.inv(strict + torch.eye(strict.shape[-1], dtype=strict.dtype))


@pytest.mark.parametrize(("noise", "eta"), [(0.0, 2.0), (0.1, 1.0), (2.0, 1.0)])
@pytest.mark.parametrize("size", inverse.SIZES)
def test_the_kernel_inverts(kernels: ModuleType, size: int, noise: float, eta: float) -> None:
    strict = system(size, noise, eta)
    wanted, found = exact(strict), kernels.invert(strict.float().mT.contiguous().mT)
    assert float((found - wanted).abs().max()) <= EXACT * float(wanted.abs().max())
    assert found.triu(1).count_nonzero() == 0


def test_gradients_of_first_and_second_order(launched: list[int]) -> None:
    strict = system(16, 2.0, 1.0)
    probe = torch.randn(strict.shape, generator=torch.Generator().manual_seed(0))

    def second(function: Any, strict: Tensor) -> list[Tensor]:
        strict = strict.detach().requires_grad_()
        loss = (function(strict.tril(-1)) * probe.to(strict)).square().sum()
        (first,) = torch.autograd.grad(loss, strict, create_graph=True)
        return [first.detach(), *torch.autograd.grad(first.square().sum(), strict)]

    found = second(inverse.inverse_unit_lower, strict.float())
    assert launched == [3]
    for one, other in zip(found, second(exact, strict), strict=True):
        assert float((one - other).abs().max()) <= EXACT * float(other.abs().max())


def level() -> FastLevel:
    torch.manual_seed(0)
    return FastLevel(12, LevelSpec(name="fast", chunk_size=16), MemoryConfig(alpha_bias=1.0))


def outcomes(made: FastLevel, x: Tensor) -> list[Tensor]:
    """Answers, the memory after, and all gradients of a function of them."""
    x = x.clone().requires_grad_()
    y, state = made(x)
    results = [y, state.memory.w2, *state.memory.w1]
    loss = sum((t.square() * t.cos()).sum() for t in results)
    assert isinstance(loss, Tensor)
    return [*(t.detach() for t in results), *torch.autograd.grad(loss, [x, *made.parameters()])]


@pytest.mark.parametrize("is_compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_fast_level_on_the_kernel_equals_one_on_pytorch(
    is_compiled: bool, request: pytest.FixtureRequest
) -> None:
    """Two sequences of two whole chunks: one launch for the systems of all first layers, and one for the
    second layers of every chunk. Compiled, the latter run in both graphs: forward and backward."""
    made, x = level(), torch.randn(2, 40, 12, generator=torch.Generator().manual_seed(1))
    expected = outcomes(made, x)
    launched = request.getfixturevalue("launched")
    made.compiled = is_compiled
    for one, other in zip(outcomes(made, x), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=10 * EXACT * float(other.abs().max()))
    assert launched == [4, 2, 2] + [2, 2] * is_compiled


@pytest.mark.parametrize(("size", "dtype"), [(16, torch.float64), (24, torch.float32), (8, torch.float32)])
def test_what_stays_on_pytorch(launched: list[int], size: int, dtype: torch.dtype) -> None:
    strict = system(size, 2.0, 1.0)
    torch.testing.assert_close(inverse.inverse_unit_lower(strict.to(dtype)), exact(strict).to(dtype))
    assert launched == []


def test_a_chosen_pytorch_takes_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(switch, "why_no_triton", lambda device: None)
    monkeypatch.setattr(inverse, "by_kernel", None)
    with switch.kernels("torch"):
        inverse.inverse_unit_lower(torch.zeros(1, 16, 16))
    with pytest.raises(TypeError, match="not callable"):
        inverse.inverse_unit_lower(torch.zeros(1, 16, 16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_comparison_that_runs_on_cards_finds_no_difference(
    kernels: ModuleType, dtype: torch.dtype
) -> None:
    assert kernels.KERNEL.name == "triangular"
    found = kernels.KERNEL.compare(CPU, dtype)
    assert kernels.SIZES == inverse.SIZES and len(found) == 4 and max(found.values()) <= EXACT


def test_a_wrong_kernel_is_found_and_left_out(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    invert, tried = kernels.invert, []

    def wrong(strict: Tensor) -> Tensor:
        tried.append(strict)
        return invert(strict) + 0.01

    monkeypatch.setattr(kernels, "invert", wrong)
    monkeypatch.setitem(sys.modules, NAME, kernels)
    monkeypatch.setattr(package, "triton", kernels)
    monkeypatch.setattr(switch, "why_no_triton", lambda device: None)
    monkeypatch.setattr(switch, "_right", {})
    strict = system(16, 2.0, 1.0)
    with pytest.warns(RuntimeWarning, match="wrong Triton kernels are left out") as warned:
        for _ in range(2):
            torch.testing.assert_close(inverse.inverse_unit_lower(strict.float()), exact(strict).float())
    assert len(tried) == 1 and len(warned) == 1


def test_tf32_only_where_products_of_pytorch_may_use_it(
    kernels: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    constants = kernels.constants

    def noted(size: int, products: str) -> dict[str, Any]:
        asked.append(products)
        return constants(size, products)

    monkeypatch.setattr(kernels, "constants", noted)
    for allowed in ("ieee", "tf32"):
        monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(fp32_precision=allowed))
        kernels.invert(torch.zeros(1, 16, 16))
    assert asked == ["tf32x3", "tf32"]


@pytest.mark.parametrize("precision", ["tf32x3", pytest.param("tf32", marks=pytest.mark.thorough)])
@pytest.mark.parametrize("size", inverse.SIZES)
@pytest.mark.parametrize("arch", SHARED)
def test_the_kernel_compiles_for_cards_without_spilling(arch: int, size: int, precision: str) -> None:
    constants = compiled.constants(size, precision)
    signature = {"strict": "*fp32", "inverse": "*fp32", **dict.fromkeys(constants, "constexpr")}
    used = usage(compiled.invert_matrices, signature, constants, arch, compiled.WARPS)
    assert used.spilled == 0 and used.registers <= 255 and used.shared <= SHARED[arch]
