"""Reading and writing in one pass against the general form, and its backward pass by finite differences."""

from __future__ import annotations

from itertools import compress

import pytest
import torch
from tolerances import assert_same
from torch import Tensor
from torch.nn import functional as F

from nested_learning.ops.delta_rule.chunk import make_rates
from nested_learning.ops.memory_mlp.chunk import MLPWeights, mlp_finish, mlp_write, predict
from nested_learning.ops.memory_mlp.fused import coefficients
from nested_learning.ops.memory_mlp.read_write import read_write


def inputs(keys: int, queries: int, d: int = 3, h: int = 4, o: int = 2, n: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    rates = torch.rand(2, n, keys, dtype=torch.float64, generator=generator)
    x = F.normalize(randn(n, queries, d), dim=-1)
    tensors = (x, rates[0].clone(), -rates[1], randn(n, keys, o), randn(n, o, h), randn(n, h, d))
    return [t.requires_grad_() for t in tensors]


def together(x: Tensor, eta: Tensor, log_alpha: Tensor, v: Tensor, w1: Tensor, w2: Tensor):
    answers, after = read_write(coefficients(eta, log_alpha), x, v, MLPWeights(w1, w2))
    return answers, *after


def apart(x: Tensor, eta: Tensor, log_alpha: Tensor, v: Tensor, w1: Tensor, w2: Tensor):
    weights, keys = MLPWeights(w1, w2), x[:, : v.shape[1]]
    written = mlp_write(make_rates(eta, log_alpha), weights, None, keys, -v)
    return predict(weights, x), *mlp_finish(written, weights, None)[0]


@pytest.mark.parametrize("keys, queries", [(1, 1), (4, 4), (4, 5), (3, 7)])
def test_backward_by_finite_differences(keys: int, queries: int) -> None:
    assert torch.autograd.gradcheck(together, inputs(keys, queries), atol=1e-6)


@pytest.mark.parametrize("keys, queries", [(1, 2), (7, 7), (64, 65)])
def test_the_same_as_a_read_and_a_general_write(keys: int, queries: int) -> None:
    given = inputs(keys, queries, d=8, h=6, o=5)
    ours, general = together(*given), apart(*given)
    length = queries * 8
    assert_same(ours, general, length)
    weights = [torch.randn_like(t) for t in ours]
    losses = [sum((a * w).sum() for a, w in zip(outs, weights, strict=True)) for outs in (ours, general)]
    assert_same(*(torch.autograd.grad(loss, given) for loss in losses), length)


def test_answers_alone_and_weights_alone_have_gradients() -> None:
    given = inputs(4, 5)
    for i in range(3):
        ours = torch.autograd.grad(together(*given)[i].square().sum(), given, allow_unused=True)
        general = torch.autograd.grad(apart(*given)[i].square().sum(), given, allow_unused=True)
        reached = [b is not None for b in general]
        assert [a is not None for a in ours] == reached
        assert_same(list(compress(ours, reached)), list(compress(general, reached)), length=5 * 4)
