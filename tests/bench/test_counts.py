"""How many kernels are counted, against runs whose kernels are known."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_models import hope
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.nn import functional as F

from nested_learning.bench.counts import (
    count_decoded,
    count_dispatches,
    count_events,
    count_run,
    count_stored,
)
from nested_learning.layers.config import MemoryConfig
from nested_learning.models.lm import HopeLM
from nested_learning.ops import kernels

TOKENS = torch.zeros(2, 21, dtype=torch.int64)


def test_operations_count_and_views_and_room_do_not() -> None:
    a = torch.randn(3, 4)

    def run() -> None:
        room = torch.empty(4, 3)
        made = (a @ a.t()).relu().view(9)[2:].unsqueeze(0)  # two kernels: a product and a maximum
        room.add_(1)
        made.clone()

    assert count_run(run, "cpu") == (4, 4)


def test_a_step_is_counted_in_both_directions() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)

        def forward(self, tokens: Tensor) -> tuple[Tensor, None]:
            return self.head(self.table(tokens)), None

    found = count_dispatches(Model(), torch.tensor([[0, 1, 2, 3]]))
    forward = {"embedding": 1, "mm": 3, "_log_softmax": 1, "nll_loss_forward": 1, "ne": 1}
    assert forward.items() <= found.names.items()  # one of three products is in the forward pass
    assert found.forward == 5 + 3  # the number of targets: their sum, its limit, the division
    assert found.total == sum(found.names.values())
    assert found.names["embedding_dense_backward"] == 1


@pytest.mark.parametrize("mixer", ["self_mod", "attention"])
def test_the_count_depends_on_layers_and_not_on_widths(mixer: str) -> None:
    def count(tokens: Tensor = TOKENS, **changes: Any) -> int:
        sizes: dict[str, Any] = {"vocab_size": 5, "dim": 8, "num_layers": 1, "num_heads": 2, "chunk_size": 8}
        return count_dispatches(HopeLM(hope(mixer, **{**sizes, **changes})), tokens).total

    one = count()
    assert one == count(dim=32) == count(num_heads=4) == count(TOKENS.repeat(2, 1))
    assert count(num_layers=3) - count(num_layers=2) == count(num_layers=2) - one > 50


def test_triton_kernels_are_counted_by_name_and_for_any_number_of_chunks() -> None:
    pytest.importorskip("triton")
    before = kernels.chosen(), kernels.why_no_triton
    options: dict[str, Any] = {"vocab_size": 5, "dim": 32, "num_heads": 2, "chunk_size": 16}
    model = HopeLM(hope("linear", num_layers=2, **options))
    short, long = (
        count_dispatches(model, torch.zeros(2, 16 * chunks + 1, dtype=torch.int64), triton=True)
        for chunks in (3, 6)
    )
    assert short == long and short.names["triton scan_states"] == 4  # two layers, two directions
    assert count_dispatches(model, torch.zeros(2, 97, dtype=torch.int64)).total > 2 * long.total
    assert (kernels.chosen(), kernels.why_no_triton) == before


def test_bytes_stored_for_the_backward_pass() -> None:
    """Of a product both factors, but no parameter; of exp its result, and of the square the same tensor."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4, 3))

        def forward(self, tokens: Tensor) -> tuple[Tensor, None]:
            x = (
                F.one_hot(tokens, 4).float() @ self.weight.double().float()
            )  # stores x in bf16, and the weight
            return x.exp().square(), None

    one, two = (count_stored(Model(), torch.zeros(1, n + 1, dtype=torch.int64)) for n in (5, 10))
    one_hot, exponential, probabilities, target = 4 * 2, 3 * 2, 3 * 4, 8  # bytes of a token
    assert two - one == 5 * (one_hot + exponential + probabilities + target)


def test_stored_bytes_grow_with_the_weights_at_the_starts_of_chunks() -> None:
    pytest.importorskip("triton")
    options: dict[str, Any] = {"vocab_size": 5, "dim": 32, "num_heads": 2, "chunk_size": 16, "num_layers": 1}
    tokens = torch.zeros(1, 16 * 8 + 1, dtype=torch.int64)
    few, all_starts = (
        count_stored(
            HopeLM(hope("self_mod", memory=MemoryConfig(keep_every=n), **options)), tokens, triton=True
        )
        for n in (8, 1)
    )
    weights, projected = 2 * 16 * 16, 16 * 16  # of a memory, and of what it projects of a chunk
    assert all_starts - few == 7 * 2 * 5 * (weights + projected) * 4  # 7 more starts of 2 heads x 5 memories


def test_a_decoded_token_costs_less_than_a_step() -> None:
    model = HopeLM(hope(vocab_size=5, dim=8, num_layers=1, num_heads=2, chunk_size=8))
    assert 30 < count_decoded(model, TOKENS) < count_dispatches(model, TOKENS).forward / 2


def test_kernels_and_starts_of_a_profile_on_a_card() -> None:
    def event(name: str, device: DeviceType, note: bool = False) -> SimpleNamespace:
        return SimpleNamespace(name=name, device_type=device, is_user_annotation=note)

    card, host = DeviceType.CUDA, DeviceType.CPU
    events = [
        *(event(name, card) for name in ("ampere_gemm", "triton_scan", "Memcpy HtoD", "Memset (Device)")),
        event("Torch-Compiled Region", card, note=True),
        *(event(name, host) for name in ("cudaGraphLaunch", "cudaLaunchKernelExC", "aten::mm", "cudaMalloc")),
    ]
    assert count_events(SimpleNamespace(events=lambda: events)) == (2, 2)
