"""The closed form of the write against the token loop: outputs, final state, every gradient, in float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import pytest
import torch
from tolerances import assert_same
from torch import Tensor
from torch.nn import functional as F

from nested_learning.ops.delta_rule import chunk as delta_chunk
from nested_learning.ops.delta_rule import naive as delta_naive
from nested_learning.ops.triangular.inverse import inverse_unit_lower

READS = ("chunk", "before_write", "after_write")
CHUNKS = (1, 2, 7, 64)
SWITCHES = list(itertools.product((True, False), repeat=3))  # delta, momentum, retention


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def unit(*shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1).requires_grad_()


def rates(lead: tuple[int, ...], steps: int, momentum: bool, retention: bool) -> list[Tensor | None]:
    def uniform() -> Tensor:
        return torch.rand(*lead, steps, dtype=torch.float64)

    alpha = uniform() if retention else torch.ones(*lead, steps, dtype=torch.float64)
    return [
        t if t is None else t.requires_grad_() for t in (uniform(), alpha, uniform() if momentum else None)
    ]


def gradients(outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of one random projection of the outputs."""
    generator = torch.Generator().manual_seed(1)
    loss = sum((y * torch.randn(y.shape, dtype=y.dtype, generator=generator)).sum() for y in outputs)
    grads = torch.autograd.grad(loss, inputs, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(grads, inputs, strict=True)]


def assert_same_with_gradients(
    fast: Sequence[Tensor], slow: Sequence[Tensor], inputs: Sequence[Tensor], length: int
) -> None:
    assert_same(fast, slow, length)
    assert_same(gradients(fast, inputs), gradients(slow, inputs), length)


@pytest.mark.parametrize(("delta", "momentum", "retention"), SWITCHES)
@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("size", CHUNKS)
def test_delta_rule_equals_the_token_loop(
    size: int, read: str, delta: bool, momentum: bool, retention: bool
) -> None:
    torch.manual_seed(0)
    lead, steps, d, o = (2, 3), 15, 5, 4
    q, k, v = randn(*lead, steps, d), unit(*lead, steps, d), randn(*lead, steps, o)
    eta, alpha, beta = rates(lead, steps, momentum, retention)
    weights, moments = randn(*lead, o, d), randn(*lead, o, d) if momentum else None
    initial = randn(*lead, o, d) if retention else None
    for objective in ("l2", "dot"):
        results = [
            f(
                q, k, v, (eta, alpha, beta), weights,
                chunk_size=size, momentum=moments, objective=objective,
                read=read, delta=delta, initial=initial,
            )
            for f in (delta_chunk.delta_rule, delta_naive.delta_rule)
        ]  # fmt: skip
        keep = 3 if momentum else 2
        inputs = [t for t in (q, k, v, eta, alpha, beta, weights, moments, initial) if t is not None]
        assert_same_with_gradients(results[0][:keep], results[1][:keep], inputs, length=steps * d)


def test_linear_dot_product_memory_is_the_gated_delta_rule() -> None:
    """W_t = W_{t−1}(α_t I − η_t k kᵀ) + η_t v kᵀ, whatever the chunk."""
    torch.manual_seed(0)
    q, k, v = randn(2, 20, 4), unit(2, 20, 4), randn(2, 20, 4)
    eta, alpha, _ = rates((2,), 20, False, True)
    weights = torch.zeros(2, 4, 4, dtype=torch.float64)
    answers, w = [], weights
    for t in range(20):
        key = k[:, t, :, None]
        erase = alpha[:, t, None, None] * torch.eye(4) - eta[:, t, None, None] * key @ key.mT
        w = w @ erase + eta[:, t, None, None] * v[:, t, :, None] @ key.mT
        answers.append((w @ q[:, t, :, None])[..., 0])
    for size in (1, 3, 20):
        y, after, _ = delta_chunk.delta_rule(
            q, k, v, (eta, alpha, None), weights, chunk_size=size, objective="dot", read="after_write"
        )
        assert_same(y, torch.stack(answers, 1), length=20 * 4)
        assert_same(after, w, length=20 * 4)


@pytest.mark.parametrize("size", [1, 3, 16, 17, 64, 100])
def test_triangular_inverse_and_its_gradients(size: int) -> None:
    torch.manual_seed(0)
    strict = (torch.randn(2, 3, size, size, dtype=torch.float64) * 0.3).tril(-1)
    whole = strict + torch.eye(size, dtype=torch.float64)
    assert_same(inverse_unit_lower(strict), torch.linalg.inv(whole), length=size**2)
    if size <= 3:
        strict.requires_grad_()
        assert torch.autograd.gradcheck(lambda n: inverse_unit_lower(n.tril(-1)), strict)
        assert torch.autograd.gradgradcheck(lambda n: inverse_unit_lower(n.tril(-1)), strict)
    probe = torch.randn(whole.shape, dtype=torch.float64)

    def gradient(function: Callable[[Tensor], Tensor]) -> Tensor:
        leaf = strict.detach().requires_grad_()
        (found,) = torch.autograd.grad((function(leaf.tril(-1)) * probe).sum(), leaf)
        return found

    expected = gradient(lambda n: torch.linalg.inv(n + torch.eye(size, dtype=torch.float64)))
    assert_same(gradient(inverse_unit_lower), expected, length=size**2)


@pytest.mark.parametrize("eta", [0.9, 1.0, 1.5, 2.0])
@pytest.mark.parametrize("noise", [0.0, 1e-3, 0.1])
def test_triangular_inverse_in_float32_with_nearly_equal_keys(noise: float, eta: float) -> None:
    """Nearly equal keys are the worst case of the delta rule: every token erases the same direction."""
    torch.manual_seed(0)
    keys = F.normalize(torch.ones(64, 16).double() + noise * torch.randn(64, 16), dim=-1)
    strict = (eta * keys @ keys.T).tril(-1)
    exact = torch.linalg.inv(strict + torch.eye(64).double())
    error = (inverse_unit_lower(strict.float()[None])[0].double() - exact).norm() / exact.norm()
    assert error < 1e-5
