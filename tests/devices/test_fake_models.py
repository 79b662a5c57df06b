"""No layer makes a tensor on the CPU when the model is on CUDA.

Fake tensors have a device and no data, so this needs no GPU: an operation on tensors of two devices raises.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from small_models import hope
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from nested_learning.layers.config import READS, MemoryConfig
from nested_learning.layers.mixer import MIXERS
from nested_learning.layers.norm import RMSNorm
from nested_learning.levels import VARIANTS, LevelSpec
from nested_learning.models.lm import HopeLM

LENGTH = 21  # two chunks of 8 and an unfinished one
LEVELS = (
    LevelSpec(name="fast", chunk_size=4, expansion=1.0),
    LevelSpec(name="slow", chunk_size=64, expansion=1.0),
)
MEMORIES: dict[str, MemoryConfig] = {
    "momentum": MemoryConfig(momentum=True),
    "no_delta": MemoryConfig(delta=False),
    "retention_to_start": MemoryConfig(retention_target="init"),
    "two_chunk_sizes": MemoryConfig(projection_chunk_size=4),
}


@pytest.fixture(autouse=True)
def fake() -> Iterator[None]:
    """All tensors of a test are fake, on whatever device they are made."""
    with FakeTensorMode(allow_non_fake_inputs=False), torch.no_grad():
        yield


def read_in_two_calls(**changes: Any) -> list[Tensor]:
    """Logits of two calls, the second from the state of the first, and the tensors of the last state."""
    sizes: dict[str, Any] = {"vocab_size": 11, "dim": 8, "num_layers": 2, "num_heads": 2, "chunk_size": 8}
    # Only while the model is made: as default device of its forward pass, CUDA would hide a missing device.
    with torch.device("cuda"):
        model = HopeLM(hope(**{**sizes, "levels": LEVELS, "seq_len": 32, **changes}))
    tokens = torch.zeros(2, LENGTH, dtype=torch.int64, device="cuda")
    first, state = model(tokens)
    second, state = model(tokens[:, :5], state)
    return [first, second, *state.tensors()]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("mixer", MIXERS)
def test_a_model_stays_on_its_device(mixer: str, variant: str) -> None:
    found = read_in_two_calls(mixer=mixer, cms_variant=variant)
    assert {tensor.device.type for tensor in found} == {"cuda"}


@pytest.mark.parametrize("name", MEMORIES)
def test_every_option_of_the_memories_stays_on_its_device(name: str) -> None:
    found = read_in_two_calls(memory=MEMORIES[name])
    assert {tensor.device.type for tensor in found} == {"cuda"}


@pytest.mark.parametrize("read", READS)
def test_every_read_stays_on_its_device(read: str) -> None:
    found = read_in_two_calls(read=read)
    assert {tensor.device.type for tensor in found} == {"cuda"}


def test_the_check_finds_a_tensor_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that forgets the device makes its tensor on the CPU, and the next operation raises."""

    def forgetful(norm: RMSNorm, x: Tensor) -> Tensor:
        return x * torch.ones(x.shape[-1])

    monkeypatch.setattr(RMSNorm, "forward", forgetful)
    with pytest.raises(RuntimeError, match=r"devices.*cuda.*cpu"):
        read_in_two_calls()
