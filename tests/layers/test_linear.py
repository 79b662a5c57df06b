"""The gated delta rule against its token loop; splits; and its memory in float32 beside bfloat16 layers."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from oracle import assert_equals_loop
from torch import Tensor

from nested_learning.layers.config import Around, MemoryConfig
from nested_learning.layers.linear import GatedDeltaRule

DIM, HEADS, TOKENS = 8, 2, 19
LENGTH = TOKENS * DIM  # operations in a row: tokens that a memory passes, times the width
CUTS = ([5], [3, 4, 11], list(range(1, TOKENS)))


AROUND = tuple(field.name for field in fields(Around))


def make(chunk: int = 4, **switches: object) -> GatedDeltaRule:
    torch.manual_seed(0)
    around = Around(**{name: switches.pop(name) for name in AROUND if name in switches})
    config = MemoryConfig(eta_bias=0.0, alpha_bias=1.0, **switches)
    layer = GatedDeltaRule(DIM, HEADS, chunk, config, around).double()
    with torch.no_grad():
        layer.rates.weight.normal_()
    return layer


def sample(tokens: int = TOKENS) -> Tensor:
    return torch.randn(2, tokens, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("retention", [True, False])
@pytest.mark.parametrize("momentum", [True, False])
@pytest.mark.parametrize("delta", [True, False])
@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_outputs_state_and_gradients_equal_the_token_loop_in_any_split(
    chunk: int, delta: bool, momentum: bool, retention: bool
) -> None:
    layer = make(chunk, delta=delta, momentum=momentum, retention=retention)
    for cuts in CUTS:
        assert_equals_loop(layer, sample(), cuts, LENGTH)


@pytest.mark.parametrize(
    "switches",
    [
        {"eta_max": 0.3},
        {"keep_every": 1},
        {"conv_window": 1},
        {"conv_window": 30},
        {"activation": "silu"},
        {"output_gate": False},
    ],
)
def test_other_options_equal_the_token_loop(switches: dict[str, object]) -> None:
    assert_equals_loop(make(**dict(switches)), sample(), [3, 4, 11], LENGTH)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def split_error(rounded: bool) -> tuple[float, float]:
    """Relative difference of outputs and of weights between one call and calls of 13 tokens, in bfloat16.

    `rounded`: the state goes through bfloat16 between the calls.
    """
    layer, x = make(16, retention=False).bfloat16(), sample(512).bfloat16()
    with torch.no_grad():
        whole, last = layer(x)
        state, parts = None, []
        for piece in x.split(13, 1):
            y, state = layer(piece, state)
            if rounded:
                state = state.map(lambda t: t.bfloat16().to(t.dtype))
            parts.append(y)
    assert state is not None and state.weights.dtype == last.weights.dtype == torch.float32
    return relative(torch.cat(parts, 1), whole), relative(state.weights, last.weights)


def test_a_bfloat16_layer_keeps_its_memory_in_float32() -> None:
    outputs, weights = split_error(rounded=False)
    assert weights < 1e-5 and outputs < 1e-3


def test_a_memory_rounded_to_bfloat16_would_be_seen() -> None:
    outputs, weights = split_error(rounded=True)
    assert weights > 1e-3 and outputs > 1e-3
