"""The hand-derived backward pass against finite differences, and the fused write against the general one."""

from __future__ import annotations

import pytest
import torch
from tolerances import assert_same
from torch import Tensor
from torch.nn import functional as F

from nested_learning.ops.delta_rule.chunk import make_rates
from nested_learning.ops.memory_mlp import fused
from nested_learning.ops.memory_mlp.chunk import MLPWeights, mlp_finish, mlp_write, predict


def inputs(size: int, outs: tuple[int, ...], d: int = 3, h: int = 4, n: int = 2) -> list[Tensor]:
    torch.manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64)

    k = F.normalize(randn(n, size, d), dim=-1)
    eta, log_alpha = torch.rand(n, size, dtype=torch.float64), -torch.rand(n, size, dtype=torch.float64)
    residuals = [randn(n, size, o) for o in outs]
    weights = [randn(n, o, h) for o in outs] + [randn(n, h, d) for _ in outs]
    return [t.requires_grad_() for t in (k, eta, log_alpha, *residuals, *weights)]


def fused_write(k: Tensor, eta: Tensor, log_alpha: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
    m = len(rest) // 3
    weights = [MLPWeights(a, b) for a, b in zip(rest[m : 2 * m], rest[2 * m :], strict=True)]
    after = fused.write(fused.coefficients(eta, log_alpha), k, rest[:m], weights)
    return tuple(t for w in after for t in w)


def general_write(k: Tensor, eta: Tensor, log_alpha: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
    m = len(rest) // 3
    after: list[Tensor] = []
    for i in range(m):
        weights = MLPWeights(rest[m + i], rest[2 * m + i])
        written = mlp_write(make_rates(eta, log_alpha), weights, None, k, rest[i])
        after += mlp_finish(written, weights, None)[0]
    return tuple(after)


@pytest.mark.parametrize("outs", [(3,), (3, 1), (3, 3, 1, 1)])
def test_write_gradient_by_finite_differences(outs: tuple[int, ...]) -> None:
    assert torch.autograd.gradcheck(fused_write, inputs(5, outs), atol=1e-6)


def test_read_gradient_by_finite_differences() -> None:
    k, _, _, _, _, w1, b1, w2, b2 = inputs(5, (3, 1))
    for pair in ((w1, w2), (b1, b2)):
        assert torch.autograd.gradcheck(lambda x, *w: fused.read(MLPWeights(*w), x), (k, *pair))
        weights = MLPWeights(*pair)
        assert_same(fused.read(weights, k), predict(weights, k), length=3 * 4)


@pytest.mark.parametrize("size", [1, 2, 7, 64])
def test_fused_write_equals_the_general_one(size: int) -> None:
    arguments = inputs(size, (5, 5, 1), d=5, h=6)
    fast, slow = fused_write(*arguments), general_write(*arguments)
    torch.manual_seed(1)
    probes = [torch.randn_like(t) for t in fast]
    length = size * 6
    assert_same(fast, slow, length)
    grads = [
        torch.autograd.grad(sum((p * t).sum() for p, t in zip(probes, ts, strict=True)), arguments)
        for ts in (fast, slow)
    ]
    assert_same(*grads, length)
