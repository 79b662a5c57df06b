"""SwiGLU against its formula, and its width."""

import pytest
import torch
from tolerances import assert_same

from nested_learning.layers.mlp import SwiGLU, swiglu_width


def test_swiglu_is_its_formula() -> None:
    torch.manual_seed(0)
    mlp = SwiGLU(dim=6, hidden=8).double()
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    gate, up = mlp.w_in.weight[:8], mlp.w_in.weight[8:]
    a = x @ gate.T
    expected = (a / (1 + torch.exp(-a)) * (x @ up.T)) @ mlp.w_out.weight.T
    y, state = mlp(x)
    assert state is None
    assert_same(y, expected, length=2 * 8)


def test_swiglu_has_no_biases() -> None:
    assert sum(p.numel() for p in SwiGLU(dim=6, hidden=8).parameters()) == 3 * 6 * 8


@pytest.mark.parametrize(
    ("dim", "expansion", "width"),
    [
        (768, 8 / 3, 2048),
        (768, 2.6666667, 2048),
        (384, 8 / 3, 1024),
        (128, 8 / 3, 344),
        (8, 1, 8),
        (9, 1, 16),
    ],
)
def test_swiglu_width(dim: int, expansion: float, width: int) -> None:
    assert swiglu_width(dim, expansion) == width


def test_swiglu_width_is_eight_thirds_by_default() -> None:
    assert swiglu_width(96) == 256
