"""RMSNorm and l2_normalize against their formulas."""

import pytest
import torch
from tolerances import assert_same

from nested_learning.layers.norm import RMSNorm
from nested_learning.ops.unit import l2_normalize


def test_rms_norm_is_its_formula() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(2, 5, 8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    norm = RMSNorm(8, eps=0.1).double()
    with torch.no_grad():
        assert torch.equal(norm.weight, torch.ones(8, dtype=torch.float64))
        norm.weight.copy_(weight)
    expected = x / (x.pow(2).sum(-1, keepdim=True) / 8 + 0.1).sqrt() * weight
    assert_same(norm(x), expected, length=8)


def test_rms_norm_of_bfloat16_is_the_rounded_float32_result() -> None:
    torch.manual_seed(0)
    x = (100 * torch.randn(4, 256)).bfloat16()
    norm = RMSNorm(256)
    with torch.no_grad():
        norm.weight.normal_()
    assert torch.equal(norm(x), norm(x.float()).bfloat16())
    assert torch.equal(norm.bfloat16()(x), norm.float()(x))


def test_l2_normalize_is_its_formula_with_a_right_gradient() -> None:
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    y = l2_normalize(x, eps=1e-6)
    root = (25 + 1e-6) ** 0.5
    expected = torch.tensor([[3 / root, 4 / root], [0.0, 0.0]], dtype=torch.float64)
    assert_same(y, expected, length=2)
    y.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad[1], torch.full((2,), 1e3, dtype=torch.float64))  # 1 / √eps


@pytest.mark.parametrize("scale", [0.0, 1e-3, 1.0])
def test_l2_normalize_gradcheck(scale: float) -> None:
    torch.manual_seed(0)
    x = (scale * torch.randn(2, 3, 4, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: l2_normalize(t, eps=1e-2), (x,))


def test_l2_normalize_in_bfloat16_is_the_rounded_float32_result() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 64).bfloat16()
    assert torch.equal(l2_normalize(x), l2_normalize(x.float()).bfloat16())
