"""One gain for all linear memories against memories that are written one by one; and what bounds the gain."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from tolerances import assert_same
from torch import Tensor

from nested_learning.layers.config import MemoryConfig
from nested_learning.ops.delta_rule.chunk import LinearMemory, finish
from nested_learning.ops.memory_mlp.chunk import WriteTokens
from nested_learning.ops.self_modifying_linear.chunk import cap, write
from nested_learning.ops.self_modifying_linear.naive import cap_steps, write_memory
from nested_learning.ops.unit import l2_normalize

HEADS, WIDTH, TOKENS = 3, 6, 21
LENGTH = TOKENS * WIDTH
SWITCH = (False, True)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def limit_of(config: MemoryConfig) -> float:
    assert config.eta_max is not None
    return config.eta_max


def sample(config: MemoryConfig) -> WriteTokens:
    """Unit keys, values of any length, and rates over all their range."""
    k, v = l2_normalize(random(HEADS, TOKENS, WIDTH)), 0.7 * random(HEADS, TOKENS, WIDTH, seed=1)
    return WriteTokens(k, v, *config.rates(list(random(3, HEADS, TOKENS, seed=2)), limit_of(config)))


def final_gain(config: MemoryConfig, tokens: WriteTokens, chunk: int) -> LinearMemory:
    """Γ and its momentum after `tokens`, from the identity."""
    one = torch.eye(tokens.k.shape[-1], dtype=tokens.k.dtype).expand(tokens.k.shape[0], -1, -1)
    moments = torch.zeros_like(one) if config.momentum else None
    gain = LinearMemory(one, moments, one if config.to_initial else None)
    count = tokens.k.shape[1]
    lengths = [min(chunk, count - first) for first in range(0, count, chunk)]
    for part in tokens.split(lengths):
        written, _ = write(config, gain, part, part.k)
        gain = LinearMemory(*finish(written, *gain), gain.initial)
    return gain


@pytest.mark.parametrize("retention", [{"retention": False}, {}, {"retention_target": "init"}])
@pytest.mark.parametrize("momentum", SWITCH)
@pytest.mark.parametrize("delta", SWITCH)
@pytest.mark.parametrize("chunk", [1, 2, 7, 64])
def test_memories_written_one_by_one_are_their_start_times_one_gain(
    chunk: int, delta: bool, momentum: bool, retention: dict[str, Any]
) -> None:
    """Of any output width, with every gradient."""
    config = MemoryConfig(eta_max=1.0, delta=delta, momentum=momentum, **retention)
    tokens = sample(config)
    inputs = [t.requires_grad_() for t in tokens if t is not None]
    tokens = WriteTokens(*inputs)
    memories = [random(HEADS, width, WIDTH, seed=width).requires_grad_() for width in (WIDTH, 1, 4)]
    gain = final_gain(config, tokens, chunk).weights
    rates = (tokens.eta, tokens.log_alpha.exp(), None if tokens.log_beta is None else tokens.log_beta.exp())
    for memory in memories:
        initial = memory if config.to_initial else None
        history = write_memory(
            memory, tokens.k, tokens.v, rates, chunk_size=chunk, delta=delta, initial=initial
        )
        assert_same(memory @ gain, history[-1], LENGTH)
        probe = random(*memory.shape, seed=9)
        expected, found = (
            torch.autograd.grad((end * probe).sum(), [memory, *inputs], retain_graph=True, allow_unused=True,
                                materialize_grads=True)
            for end in (history[-1], memory @ gain)
        )  # fmt: skip
        assert_same(found, expected, LENGTH)


def test_the_cap_is_its_formula() -> None:
    eta, alpha = 0.1 * random(2, 50, seed=3).sigmoid(), random(2, 50).sigmoid()
    difference = random(2, 50, 4, seed=1)
    capped = cap(eta, alpha.log(), difference)
    assert_same(capped, cap_steps(eta, 1 - alpha, difference), 1)
    bound = 0.999 * (1 - alpha) / difference.norm(dim=-1)
    assert (capped < bound).all() and (capped < eta).all()
    assert_same(cap(1e-9 * eta, alpha.log(), difference), 1e-9 * eta, 10**4)  # far below: as it was


def test_the_cap_has_finite_gradients_where_there_is_nothing_to_add_or_to_forget() -> None:
    for log_alpha, difference in ((0.0, 1.0), (-1e-44, 1.0), (-0.5, 0.0)):
        inputs = [torch.tensor([[0.5]]), torch.tensor([[log_alpha]]), torch.full((1, 1, 4), difference)]
        eta = cap(*(t.requires_grad_() for t in inputs))
        assert eta.isfinite().all()
        assert all(g.isfinite().all() for g in torch.autograd.grad(eta.sum(), inputs))


KEYS: dict[str, Callable[[int], Tensor]] = {
    "random": lambda n: random(HEADS, n, WIDTH),
    "equal": lambda n: random(HEADS, 1, WIDTH).expand(-1, n, -1),
    "alternating": lambda n: random(HEADS, 2, WIDTH).repeat(1, n, 1)[:, :n],
    "orthogonal in turn": lambda n: torch.eye(WIDTH).double().repeat(HEADS, n, 1)[:, :n],
    "opposite": lambda n: random(HEADS, 1, WIDTH) * (-1.0) ** torch.arange(n)[:, None],
    "nearly equal": lambda n: random(HEADS, 1, WIDTH) + 1e-3 * random(HEADS, n, WIDTH, seed=1),
}
VALUES: dict[str, Callable[[Tensor], Tensor]] = {
    "the key": lambda k: k,  # no error: what is left is the product of all αI − ηkkᵀ
    "opposite": lambda k: -k,
    "long": lambda k: 10 * random(*k.shape, seed=4),
    "key of the next token": lambda k: k.roll(-1, 1),
}
LOGITS: dict[str, Callable[[int], Tensor]] = {
    "any": lambda n: 4 * random(3, HEADS, n, seed=2),
    "largest steps, fast forgetting": lambda n: (
        torch.tensor([9.0, -2.0, 0.0]).view(3, 1, 1).expand(-1, HEADS, n)
    ),
    "largest steps, slow forgetting": lambda n: (
        torch.tensor([9.0, 9.0, 0.0]).view(3, 1, 1).expand(-1, HEADS, n)
    ),
}


def tokens_of(
    config: MemoryConfig, keys: str, values: str, logits: str, dtype: torch.dtype, count: int = 64
) -> WriteTokens:
    k = l2_normalize(KEYS[keys](count)).to(dtype)
    v = VALUES[values](k.double()).to(dtype)
    eta, log_alpha, _ = config.rates(list(LOGITS[logits](count).to(dtype)), limit_of(config))
    return WriteTokens(k, v, cap(eta, log_alpha, k - v) if config.injection_cap else eta, log_alpha)


def largest_norm(matrices: Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrices.double(), 2).max())


CLAMPED = MemoryConfig(eta_max=2.0)
CAPPED = MemoryConfig(eta_max=2.0, injection_cap=True)
ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-5}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize("logits", LOGITS)
def test_no_gain_lengthens_anything(keys: str, logits: str, dtype: torch.dtype) -> None:
    """‖Γ‖ ≤ 1 after every token and every chunk: with the clamp for what the delta term leaves, with the cap
    for all that is written."""
    for config, values in [(CLAMPED, "the key"), *((CAPPED, name) for name in VALUES)]:
        tokens = tokens_of(config, keys, values, logits, dtype)
        most = 1 + ROUNDING[dtype]
        for chunk in (1, 16, 64):
            assert largest_norm(final_gain(config, tokens, chunk).weights) <= most
        one = torch.eye(WIDTH, dtype=dtype).expand(HEADS, -1, -1)
        rates = (tokens.eta, tokens.log_alpha.exp(), None)
        history = write_memory(one, tokens.k, tokens.v, rates, chunk_size=64)
        assert largest_norm(torch.stack(history)) <= most


def test_without_control_gains_do_lengthen() -> None:
    """Otherwise the test above would say nothing."""
    free = replace(CLAMPED, step_control="none")
    forgetful = tokens_of(free, "equal", "the key", "largest steps, fast forgetting", torch.float64)
    assert largest_norm(final_gain(free, forgetful, 64).weights) > 1e3
    clamped = tokens_of(CLAMPED, "alternating", "opposite", "largest steps, slow forgetting", torch.float64)
    assert largest_norm(final_gain(CLAMPED, clamped, 16).weights) > 4


def test_the_clamp_leaves_smaller_steps_and_bounds_larger_ones() -> None:
    logits = list(6 * random(3, HEADS, 200))
    for most in (0.5, 1.0, 2.0):
        eta, log_alpha, _ = MemoryConfig(eta_max=most).rates(logits, most)
        free = MemoryConfig(eta_max=most, step_control="none").rates(logits, most)[0]
        alpha = log_alpha.exp()
        assert (eta <= 2 * alpha).all() and (free > 2 * alpha).any()
        below = free < 1.99999 * alpha
        assert torch.equal(eta[below], free[below])
        if most <= 1:
            assert below[alpha > 0.501].all()  # then forgetting by less than half leaves η as it is
    assert torch.equal(MemoryConfig(eta_max=2.0, delta=False).rates(logits, 2.0)[0],
                       MemoryConfig(eta_max=2.0, step_control="none").rates(logits, 2.0)[0])  # fmt: skip
