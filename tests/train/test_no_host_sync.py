"""A training step reads nothing back from the device: on CUDA every such read would make the host wait."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nested_learning.layers.config import MemoryConfig
from nested_learning.layers.mixer import MIXERS
from nested_learning.levels import LevelSpec
from nested_learning.models.config import HopeConfig
from nested_learning.models.lm import HopeLM
from nested_learning.optim.build import build_optimizer
from nested_learning.optim.config import OptimConfig
from nested_learning.train.guard import UpdateGuard
from nested_learning.train.objective import next_token_loss

READS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero", "aten::unique2"}


class HostReads(TorchDispatchMode):
    """Counts the operations that need a value of a tensor on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name in READS:
            self.seen.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def test_the_counter_sees_a_read() -> None:
    with HostReads() as reads:
        float(torch.ones(()) + 1)
    assert reads.seen == ["aten::_local_scalar_dense"]


@pytest.mark.parametrize("keep_every", [None, 2])
@pytest.mark.parametrize("mixer", MIXERS)
def test_a_training_step_reads_nothing_from_the_device(mixer: str, keep_every: int | None) -> None:
    torch.manual_seed(0)
    model = HopeLM(
        HopeConfig(
            vocab_size=31,
            dim=16,
            num_layers=1,
            num_heads=2,
            mixer=mixer,
            chunk_size=4,
            memory=MemoryConfig(keep_every=keep_every),
            levels=(LevelSpec(name="fast", chunk_size=4), LevelSpec()),
        )
    )
    optimizer = build_optimizer(OptimConfig(), model)
    guard = UpdateGuard(optimizer, torch.device("cpu"), deferred=True)  # as on CUDA
    tokens = torch.randint(31, (2, 18))
    for _ in range(2):  # the first step makes the optimizer's state
        with HostReads() as reads:
            optimizer.zero_grad(set_to_none=True)
            loss = next_token_loss(model(tokens[:, :-1])[0], tokens[:, 1:], count=34)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            guard.step(loss, norm)
        assert reads.seen == []
