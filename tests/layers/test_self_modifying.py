"""The self-modifying layer against the token loop of its equations, and what every memory layer must keep."""

from __future__ import annotations

import pytest
import torch
from naive_self_modifying import naive_self_modifying
from oracle import assert_equals_loop
from tolerances import SAFETY, assert_same

from nested_learning.layers.config import MemoryConfig
from nested_learning.layers.self_modifying import SelfModifyingTitans, TitansMemory
from nested_learning.state import State

LIVELY = {
    "eta_max": 1.0,
    "eta_bias": 0.0,
    "alpha_bias": 1.0,
}  # large steps and fast forgetting: differences show
LENGTH = 19 * 8  # tokens that a memory passes, times the width
VARIANTS = {
    "default": MemoryConfig(**LIVELY),
    "momentum": MemoryConfig(**LIVELY, momentum=True),
    "no_delta": MemoryConfig(**LIVELY, delta=False),
    "no_retention": MemoryConfig(**LIVELY, retention=False),
    "towards_init": MemoryConfig(**LIVELY, retention_target="init"),
    "all_adaptive": MemoryConfig(**LIVELY, adaptive=("k", "v", "q", "eta", "alpha"), hidden=5),
    "only_memory": MemoryConfig(**LIVELY, adaptive=()),
    "plain_targets": MemoryConfig(**LIVELY, adaptive=("k", "v"), self_targets=False),
    "plain_targets_but_rates": MemoryConfig(**LIVELY, adaptive=("eta", "q"), self_targets=False),
    "stop_targets": MemoryConfig(**LIVELY, stop_gradient_targets=True),
    "keep_every_1": MemoryConfig(**LIVELY, keep_every=1),
    "keep_every_3": MemoryConfig(**LIVELY, keep_every=3),
    "fast_projections": MemoryConfig(**LIVELY, projection_chunk_size=2),
    "slow_projections": MemoryConfig(**LIVELY, projection_chunk_size=8),
    "small_steps": MemoryConfig(**LIVELY, projection_eta_max=0.1),
    "small_steps_at_once": MemoryConfig(**LIVELY, projection_eta_max=0.1, projection_chunk_size=2),
}


def make(variant: str, read: str = "chunk", chunk: int = 4) -> SelfModifyingTitans:
    torch.manual_seed(0)
    layer = SelfModifyingTitans(8, 2, chunk, read, VARIANTS[variant]).double()
    with torch.no_grad():
        for memory in layer.memories.values():
            memory.initial_w1.normal_()
        layer.rates.weight.normal_()
    return layer


def sample(tokens: int = 19, batch: int = 2) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(batch, tokens, 8, dtype=torch.float64)


@pytest.mark.parametrize("read", ["chunk", "before_write", "after_write"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("chunk", [1, 4, 64])
def test_layer_equals_the_token_loop(variant: str, read: str, chunk: int) -> None:
    if VARIANTS[variant].projection_chunk_size and chunk == 1:
        chunk = 2
    layer, x = make(variant, read, chunk), sample()
    assert_same(layer(x)[0], naive_self_modifying(layer, x)[0], LENGTH)


@pytest.mark.parametrize("self_targets", [True, False])
def test_heads_as_wide_as_a_rate_equal_the_token_loop(self_targets: bool) -> None:
    torch.manual_seed(0)
    config = MemoryConfig(**LIVELY, self_targets=self_targets)
    layer = SelfModifyingTitans(2, 2, 4, config=config).double()
    assert_equals_loop(layer, sample()[..., :2], [3, 4, 11], LENGTH)


def in_pieces(layer: SelfModifyingTitans, x: torch.Tensor, cuts: list[int]) -> tuple[torch.Tensor, State]:
    state, parts = None, []
    for first, end in zip([0, *cuts], [*cuts, x.shape[1]], strict=True):
        y, state = layer(x[:, first:end], state)
        parts.append(y)
    return torch.cat(parts, 1), state


@pytest.mark.parametrize("read", ["chunk", "before_write", "after_write"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("cuts", [[5], [3, 4, 11], list(range(1, 19))])
def test_any_split_gives_the_same_answers_and_state(variant: str, read: str, cuts: list[int]) -> None:
    layer, x = make(variant, read), sample()
    whole, last = layer(x)
    parts, state = in_pieces(layer, x, cuts)
    assert_same(parts, whole, LENGTH)
    assert state.position == last.position
    assert_same(state.tensors(), last.tensors(), LENGTH)


@pytest.mark.parametrize("variant", ["default", "no_retention"])
def test_rounding_in_any_split_is_far_below_the_tolerance(variant: str) -> None:
    """In float32, where it shows; without retention large steps magnify it most."""
    layer, x = make(variant, "before_write").float(), sample().float()
    whole, last = layer(x)
    for cuts in ([5], [3, 4, 11], list(range(1, 19))):
        parts, state = in_pieces(layer, x, cuts)
        assert_same(parts, whole, LENGTH, SAFETY / 10)
        assert_same(state.tensors(), last.tensors(), LENGTH, SAFETY / 10)


@pytest.mark.parametrize("read", ["chunk", "before_write", "after_write"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_equal_those_of_the_token_loop(variant: str, read: str) -> None:
    layer, x = make(variant, read), sample().requires_grad_()
    weights = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(2))

    def gradients(outputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        loss, inputs = (outputs * weights).sum(), [x, *layer.parameters()]
        return torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)

    assert_same(gradients(layer(x)[0]), gradients(naive_self_modifying(layer, x)[0]), LENGTH)


def test_gradient_through_the_state_after_a_scan() -> None:
    """The next segment's loss reaches the parameters as if nothing had been split, mid-chunk too."""
    layer, x = make("default"), sample()
    whole, _ = layer(x)
    first, state = layer(x[:, :9])
    rest, _ = layer(x[:, 9:], state)
    parameters = list(layer.parameters())
    split = torch.autograd.grad(torch.cat([first, rest], 1).square().sum(), parameters)
    assert_same(split, torch.autograd.grad(whole.square().sum(), parameters), LENGTH)


def test_gradient_through_the_writes_by_finite_differences() -> None:
    """The outer loss reaches every initial memory, through writes only (three chunks)."""
    layer, x = make("default"), sample(9, 1)
    names = [f"memories.{name}.initial_{w}" for name in layer.memories for w in ("w1", "w2")]
    parameters = dict(layer.named_parameters())

    def loss(*values: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))[0]

    assert torch.autograd.gradcheck(loss, tuple(parameters[n] for n in names), atol=1e-6)


def test_titans_is_the_layer_without_self_modification() -> None:
    torch.manual_seed(0)
    layer, x = TitansMemory(8, 2, 4, config=MemoryConfig(**LIVELY)).double(), sample()
    assert list(layer.memories) == ["memory"]
    assert_same(layer(x)[0], naive_self_modifying(layer, x)[0], LENGTH)


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("period", [1, 2])
@pytest.mark.parametrize("chunk", [1, 16, 64])
def test_ten_thousand_repeats_stay_bounded(dtype: torch.dtype, period: int, chunk: int) -> None:
    """One token, or two in turn, 10,000 times at the default rates: the state stays finite and bounded."""
    torch.manual_seed(0)
    layer = SelfModifyingTitans(16, 2, chunk).to(dtype)
    x = torch.randn(1, period, 16).repeat(1, (10_000 if chunk > 1 else 2_000) // period, 1).to(dtype)
    with torch.no_grad():
        y, state = layer(x)
    assert y.isfinite().all()
    start = max(t.norm() for t in layer.init_state(1).tensors())
    assert all(t.isfinite().all() and t.norm() < 50 * start for t in state.tensors())
