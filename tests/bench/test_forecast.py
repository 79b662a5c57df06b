"""Forecasts by known numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest
from small_models import hope

from nested_learning.bench.flops import forward_work
from nested_learning.bench.forecast import (
    DENSE_SHARE,
    GAP,
    H100,
    SMALL_SHARE,
    Card,
    decoding_forecast,
    state_floats,
    training_forecast,
)
from nested_learning.models.bill import count_parameters

WIDE = {"vocab_size": 1000, "dim": 768, "num_layers": 2, "num_heads": 12}


def test_a_transformer_takes_its_operations_at_the_share_of_the_rate() -> None:
    config = hope("attention", **WIDE)
    flops = 3 * sum(item.flops for item in forward_work(config, 8, 2048))
    made = training_forecast(config, 8, 2048, rest=100)
    assert made.dense == pytest.approx(flops / (DENSE_SHARE * 989e12))
    assert made.total == pytest.approx(made.dense + 100 * GAP)
    slow = replace(H100, memory=1e9)  # where memory decides
    moved = 3 * 2 * sum(item.numbers for item in forward_work(config, 8, 2048))
    assert training_forecast(config, 8, 2048, 0, card=slow).dense == pytest.approx(moved / 1e9)


def test_memories_take_the_multiprocessors_that_have_a_program() -> None:
    config = hope("titans", **WIDE)
    card = Card("small", 1e15, 3e14, 1e12, processors=100, source="")
    full, few = (training_forecast(config, batch, 640, 0, "tf32", card) for batch in (10, 1))
    small = 4 * sum(item.flops for item in forward_work(config, 1, 640) if item.batched)
    assert few.memories == pytest.approx(small / (3e14 * SMALL_SHARE * 12 / 100))
    assert full.memories == pytest.approx(10 * small / (3e14 * SMALL_SHARE))
    thrice = training_forecast(config, 1, 640, 0, "tf32x3", card)
    assert thrice.memories == pytest.approx(3 * few.memories)
    assert few.starts == pytest.approx(2 * 2 * 10 * GAP)  # kernels · layers · chunks
    floats = 2 * 64 * 64 * 12  # two matrices a head
    assert floats <= state_floats(config) <= 1.2 * floats  # and the tokens of the convolution
    assert few.state == pytest.approx(2 * 2 * 2 * 10 * 4 * state_floats(config) / 1e12)


def test_the_linear_memory_works_on_all_chunks_at_once() -> None:
    config = hope("linear", **WIDE)
    one, eight = (training_forecast(config, batch, 640, 1000, "tf32") for batch in (1, 8))
    batched = [item for item in forward_work(config, 1, 640) if item.batched]
    assert one.memories == pytest.approx(3 * sum(item.flops for item in batched) / (494e12 * SMALL_SHARE))
    assert one.state == pytest.approx(3 * 4 * sum(item.numbers for item in batched) / 3.35e12)
    assert eight.memories == pytest.approx(8 * one.memories)
    assert one.starts == eight.starts == pytest.approx(1000 * GAP)


def test_a_cache_grows_and_a_memory_does_not() -> None:
    plain, memory = hope("attention", **WIDE), hope("titans", **WIDE)
    near, far = (decoding_forecast(plain, 1, at, 0) for at in (100, 32_100))
    assert far.state - near.state == pytest.approx(2 * 2 * 32_000 * 768 * 2 / 3.35e12)
    assert near.dense == far.dense == 8 * count_parameters(plain) / 3.35e12
    assert decoding_forecast(memory, 1, 100, 7) == decoding_forecast(memory, 1, 32_100, 7)
