"""Linear memories that rewrite themselves: the layer with one gain against memories written one by one."""

from __future__ import annotations

import pytest
import torch
from oracle import assert_equals_loop, gradients, in_pieces, liven
from tolerances import SAFETY, assert_same
from torch import Tensor

from nested_learning.layers.config import READS, Around, MemoryConfig
from nested_learning.layers.self_modifying_linear import SelfModifyingLinear
from nested_learning.models.config import HopeConfig

DIM, HEADS, TOKENS = 8, 2, 19
LENGTH = TOKENS * DIM  # tokens that a memory passes, times the width
LIVELY = {"eta_max": 1.0, "eta_bias": 0.0, "alpha_bias": 1.0}
VARIANTS = {
    "default": MemoryConfig(**LIVELY),
    "momentum": MemoryConfig(**LIVELY, momentum=True),
    "no_delta": MemoryConfig(**LIVELY, delta=False),
    "no_retention": MemoryConfig(**LIVELY, retention=False),
    "towards_init": MemoryConfig(**LIVELY, retention_target="init"),
    "all_adaptive": MemoryConfig(**LIVELY, adaptive=("eta", "q", "k", "alpha", "v")),
    "only_memory": MemoryConfig(**LIVELY, adaptive=()),
    "only_values": MemoryConfig(**LIVELY, adaptive=("v",)),
    "only_a_rate": MemoryConfig(**LIVELY, adaptive=("alpha",)),
    "reflections": MemoryConfig(eta_max=2.0, eta_bias=0.0, alpha_bias=1.0),
    "free_steps": MemoryConfig(**LIVELY, step_control="none"),
    "capped": MemoryConfig(**LIVELY, injection_cap=True),
    "recomputed": MemoryConfig(**LIVELY, keep_every=2),
}


def make(
    variant: str, read: str = "chunk", chunk: int = 4, around: Around | None = None
) -> SelfModifyingLinear:
    torch.manual_seed(0)
    layer = SelfModifyingLinear(DIM, HEADS, chunk, read, VARIANTS[variant], around or Around()).double()
    liven(layer)
    return layer


def sample(tokens: int = TOKENS, batch: int = 2) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(batch, tokens, DIM, dtype=torch.float64)


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("chunk", [1, 4, 64])
def test_outputs_memories_and_gradients_equal_the_token_loop_in_any_split(
    chunk: int, variant: str, read: str
) -> None:
    assert_equals_loop(make(variant, read, chunk), sample(), [3, 4, 11], LENGTH)


@pytest.mark.parametrize("around", [Around(output_gate=False), Around(conv_window=1, activation="silu")])
def test_what_stands_around_it_equals_the_token_loop(around: Around) -> None:
    assert_equals_loop(make("default", around=around), sample(), list(range(1, TOKENS)), LENGTH)


def test_heads_as_wide_as_a_rate_equal_the_token_loop() -> None:
    torch.manual_seed(0)
    layer = SelfModifyingLinear(2, 2, 4, config=VARIANTS["default"]).double()
    liven(layer)
    assert_equals_loop(layer, sample()[..., :2], [3], 1000 * LENGTH)  # keys are ±1: gradients cancel


@pytest.mark.parametrize("variant", ["default", "no_retention", "reflections"])
def test_rounding_in_any_split_is_far_below_the_tolerance(variant: str) -> None:
    """In float32, where it shows."""
    layer, x = make(variant, "before_write").float(), sample().float()
    whole, last = layer(x)
    for cuts in ([5], [3, 4, 11], list(range(1, TOKENS))):
        parts, state = in_pieces(layer, x, cuts)
        assert_same(parts, whole, LENGTH, SAFETY / 10)
        assert_same(state.tensors(), last.tensors(), LENGTH, SAFETY / 10)


def test_gradient_through_the_writes_by_finite_differences() -> None:
    """The outer loss reaches every initial memory, through the gain too (three chunks)."""
    layer, x = make("default"), sample(9, 1)
    names = [f"memories.{name}" for name in layer.memories]
    parameters = dict(layer.named_parameters())

    def loss(*values: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))[0]

    assert torch.autograd.gradcheck(loss, tuple(parameters[n] for n in names), atol=1e-6)


def test_gradient_through_the_state_after_a_scan() -> None:
    layer, x = make("momentum"), sample()
    whole, state = layer(x)
    parts, after = in_pieces(layer, x, [9])
    parameters = list(layer.parameters())
    assert_same(
        gradients([parts, after.gain], parameters), gradients([whole, state.gain], parameters), LENGTH
    )


def test_the_state_is_one_matrix_per_head_whatever_is_adaptive() -> None:
    for adaptive in ((), ("k", "v", "q", "eta", "alpha")):
        layer = SelfModifyingLinear(DIM, HEADS, 4, config=MemoryConfig(adaptive=adaptive))
        state = layer(sample(8).float())[1]
        assert state.gain.shape == (2, HEADS, DIM // HEADS, DIM // HEADS)
        assert state.momentum is None and state.pending is None


def test_a_state_of_another_chunk_size_is_refused() -> None:
    layer, x = make("default"), sample()
    with pytest.raises(ValueError, match="state must be of chunk size 4, got one of 2"):
        layer(x, make("default", chunk=2)(x)[1])


def test_what_would_not_share_a_gain_is_refused() -> None:
    refused = (
        {"self_targets": False},
        {"stop_gradient_targets": True},
        {"projection_chunk_size": 8},
        {"hidden": 4},
        {"error_limit": 1.0},
    )
    for option in refused:
        (name,) = option
        with pytest.raises(
            ValueError, match=f"model.memory.{name} is not read by model.mixer = self_mod_linear"
        ):
            HopeConfig(mixer="self_mod_linear", memory=MemoryConfig(**option))
    HopeConfig(mixer="self_mod_linear", memory=MemoryConfig(injection_cap=True))
    for mixer in ("self_mod", "titans", "linear"):
        with pytest.raises(ValueError, match=f"injection_cap is not read by model.mixer = {mixer}"):
            HopeConfig(mixer=mixer, memory=MemoryConfig(injection_cap=True))
    for option in ({"momentum": True}, {"retention": False}, {"retention_target": "init"}):
        with pytest.raises(ValueError, match="injection_cap needs retention towards zero and no momentum"):
            MemoryConfig(injection_cap=True, **option)


def test_retention_decides_what_is_left_after_a_long_text() -> None:
    """M(k) = M(v) for all tokens means M = 0; retention towards the start holds against it."""
    left = {}
    for target in ("zero", "init"):
        torch.manual_seed(0)
        layer = SelfModifyingLinear(16, 2, 64, config=MemoryConfig(retention_target=target))
        with torch.no_grad():
            state = layer(torch.randn(1, 4096, 16))[1]
        left[target] = float(torch.linalg.matrix_norm(state.gain, 2).max())
    assert left["zero"] < 0.02
    assert left["init"] > 0.2


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("period", [1, 2])
@pytest.mark.parametrize("chunk", [1, 16, 64])
def test_ten_thousand_repeats_stay_bounded(dtype: torch.dtype, period: int, chunk: int) -> None:
    """One token, or two in turn, 10,000 times at the default rates: the gain stays finite and bounded."""
    torch.manual_seed(0)
    layer = SelfModifyingLinear(16, 2, chunk).to(dtype)
    x = torch.randn(1, period, 16).repeat(1, (10_000 if chunk > 1 else 2_000) // period, 1).to(dtype)
    with torch.no_grad():
        y, state = layer(x)
    assert y.isfinite().all()
    assert all(t.isfinite().all() and t.norm() < 50 for t in state.tensors())
