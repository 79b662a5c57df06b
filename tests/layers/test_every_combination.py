"""Every combination of the options of the write, on a tiny layer, against the token loop with gradients."""

from __future__ import annotations

import itertools

import pytest
import torch
from oracle import assert_equals_loop, liven

from nested_learning.layers.cms import CMS
from nested_learning.layers.config import READS, MemoryConfig
from nested_learning.layers.self_modifying import SelfModifyingTitans
from nested_learning.levels import KEYS, TARGETS, LevelSpec

LIVELY = {"eta_max": 1.0, "eta_bias": 0.0, "alpha_bias": 1.0}  # large steps, fast forgetting
TOKENS, DIM, CHUNK = 5, 2, 2
LENGTH = TOKENS * DIM * 4
RETENTION = {
    "none": {"retention": False},
    "zero": {"retention": True},
    "init": {"retention": True, "retention_target": "init"},
}
SWITCH = (False, True)


@pytest.mark.parametrize("retention", RETENTION)
@pytest.mark.parametrize("momentum", SWITCH)
@pytest.mark.parametrize("delta", SWITCH)
@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("projection_chunk_size", [None, 1, pytest.param(4, marks=pytest.mark.thorough)])
def test_self_modifying(
    projection_chunk_size: int | None, read: str, delta: bool, momentum: bool, retention: str
) -> None:
    for self_targets, stop in itertools.product(SWITCH, SWITCH):
        config = MemoryConfig(
            **LIVELY, **RETENTION[retention], delta=delta, momentum=momentum, self_targets=self_targets,
            stop_gradient_targets=stop, projection_chunk_size=projection_chunk_size, adaptive=("k", "eta"),
        )  # fmt: skip
        torch.manual_seed(0)
        layer = SelfModifyingTitans(DIM, 1, CHUNK, read, config).double()
        liven(layer)
        print(config)
        assert_equals_loop(layer, torch.randn(1, TOKENS, DIM, dtype=torch.float64), [3], LENGTH)


@pytest.mark.parametrize("retention", RETENTION)
@pytest.mark.parametrize("momentum", SWITCH)
@pytest.mark.parametrize("delta", SWITCH)
@pytest.mark.parametrize("eta", [None, 0.4])
def test_fast_level(eta: float | None, delta: bool, momentum: bool, retention: str) -> None:
    config = MemoryConfig(**LIVELY, **RETENTION[retention], delta=delta, momentum=momentum)
    for key, target in itertools.product(KEYS, TARGETS):
        torch.manual_seed(0)
        spec = LevelSpec(name="fast", chunk_size=CHUNK, eta=eta, key=key, target=target)
        layer = CMS(DIM, [spec], memory=config).double()
        liven(layer)
        print(spec, config)
        assert_equals_loop(layer, torch.randn(1, TOKENS, DIM, dtype=torch.float64), [3], LENGTH)
