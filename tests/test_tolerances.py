"""The tolerance of the tests: it forgives another order of sums, and nothing else."""

from __future__ import annotations

import pytest
import torch
from reorder_sums import reorder_sums
from tolerances import assert_same, tolerance
from torch import Tensor

WIDTH, LAYERS = 32, 4
LENGTH = WIDTH * LAYERS
FACTORS = {torch.float64: 1000.0, torch.float32: 1.0}


def layers(dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64).to(dtype) for _ in range(LAYERS)
    ]


def chain(weights: list[Tensor], order: list[int]) -> Tensor:
    """The product of all weights, with the terms of every inner sum added in the given order."""
    out = weights[0]
    for weight in weights[1:]:
        out = sum((out[:, i, None] * weight[i] for i in order), torch.zeros_like(out)) / WIDTH**0.5
    return out


@pytest.mark.parametrize("dtype", FACTORS)
def test_sums_in_another_order_are_the_same(dtype: torch.dtype) -> None:
    weights = layers(dtype)
    forward = chain(weights, list(range(WIDTH)))
    shuffled = chain(weights, list(reversed(range(WIDTH))))
    assert not torch.equal(forward, shuffled)
    assert_same({"a": [shuffled]}, {"a": [forward]}, LENGTH, FACTORS[dtype])
    apart = (forward - shuffled).abs() / forward.abs()
    assert apart.max() > 20 * torch.finfo(dtype).eps  # small entries are far apart, measured by themselves


@pytest.mark.parametrize("dtype, error", [(torch.float64, 1e-6), (torch.float32, 1e-3)])
def test_an_error_in_one_block_is_not_forgiven(dtype: torch.dtype, error: float) -> None:
    expected = chain(layers(dtype), list(range(WIDTH)))
    actual = expected.clone()
    assert_same(actual, expected, LENGTH, FACTORS[dtype])
    actual[8:12, 16:20] *= 1 + error
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        assert_same([actual, expected], [expected, expected], LENGTH, FACTORS[dtype])


def test_the_scale_is_that_of_each_tensor_or_the_given_one() -> None:
    large, small = torch.full((2,), 1e6, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    noise = torch.tensor([0.0, 1e-9], dtype=torch.float64)
    assert_same(large + noise, large, 10)
    with pytest.raises(AssertionError, match="Greatest absolute difference: 1e-09"):
        assert_same([large, small + noise], [large, small], 10)
    assert_same(small + noise, small, 10, scale=1e3)
    assert tolerance(10, torch.float32, factor=2) == 20 * 2**-23


@pytest.mark.parametrize(
    "actual",
    [
        torch.ones(3, 1),  # would broadcast
        torch.ones(3, dtype=torch.float64),
        torch.tensor([1.0, 1.0, torch.nan]),
        [torch.ones(3)],
        None,
    ],
)
def test_other_shapes_types_and_nan_are_not_the_same(actual: object) -> None:
    with pytest.raises((AssertionError, TypeError)):
        assert_same(actual, torch.ones(3), 10)


def test_other_nestings_are_not_the_same() -> None:
    one = torch.ones(3)
    with pytest.raises(ValueError, match="argument 2 is longer"):
        assert_same([one], [one, one], 10)
    with pytest.raises(AssertionError, match="different names"):
        assert_same({"a": one, "b": one}, {"a": one}, 10)
    assert_same({"a": (one, [])}, {"a": (one, [])}, 10)


@pytest.mark.parametrize("dtype", FACTORS)
def test_reordered_kernels_are_as_exact_but_not_the_same(dtype: torch.dtype) -> None:
    """In products, their gradients and sums with a bias; for as long as the kernels are held."""
    generator = torch.Generator().manual_seed(2)
    x, w, bias, g = (
        torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in ((3, 50, 60), (3, 60, 70), (70,), (3, 50, 70))
    )

    def compute() -> dict[str, Tensor]:
        out = {"bmm": x @ w, "mm": x[0] @ w[0], "addmm": torch.addmm(bias, x[0], w[0], beta=2, alpha=3)}
        out["baddbmm"] = torch.baddbmm(bias, x, w, beta=2, alpha=3)
        out["no bias"] = torch.baddbmm(torch.full_like(g, torch.nan), x, w, beta=0)
        out["dx"], out["dw"], out["dbias"] = torch.autograd.grad(out["baddbmm"], (x, w, bias), g)
        return {name: value.detach() for name, value in out.items()}

    with reorder_sums(0):
        first = compute()
    with reorder_sums(1):
        second = compute()
    third = compute()
    for other in (first, third):
        assert_same(second, other, length=150, factor=2 if dtype == torch.float32 else 1000)
        assert [name for name in other if torch.equal(second[name], other[name])] == ["dbias"]
