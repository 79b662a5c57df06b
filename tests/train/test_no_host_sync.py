"""A training step reads nothing back from the device: on CUDA every such read would make the host wait."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nested_learning.adapt import AdaptConfig
from nested_learning.layers.config import MemoryConfig
from nested_learning.layers.documents import Documents
from nested_learning.layers.mixer import FAST_LEVEL, MIXERS
from nested_learning.levels import LevelSpec
from nested_learning.models.config import HopeConfig
from nested_learning.models.lm import HopeLM
from nested_learning.optim.build import MATRIX_OPTIMIZERS, OPTIMIZERS, build_optimizer
from nested_learning.optim.config import OptimConfig
from nested_learning.train.guard import UpdateGuard
from nested_learning.train.objective import next_token_loss
from nested_learning.train.online import online_loss
from nested_learning.train.trainer import slow_levels

READS = {
    *("aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::equal", "aten::allclose"),
    *(
        "aten::nonzero",
        "aten::masked_select",
        "aten::_unique2",
        "aten::unique_dim",
        "aten::unique_consecutive",
    ),
    *("aten::bincount", "aten::repeat_interleave.Tensor", "aten::linalg_cholesky", "aten::linalg_inv"),
}
"""Operations whose result the host must know: a value, or a shape that depends on values. (The last two check
whether they have worked.)"""
MASKED = {"aten::index", "aten::index_put_", "aten::index_put", "aten::_index_put_impl_"}
"""The same where an index is a mask of booleans."""


class HostReads(TorchDispatchMode):
    """Counts the operations that need a value of a tensor on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        full = f"{name}.{func._schema.overload_name}"
        masks = name in MASKED and any(t is not None and t.dtype == torch.bool for t in args[1])
        if name in READS or full in READS or masks:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("read", "name"),
    [
        (lambda x: float(x.sum()), "aten::_local_scalar_dense"),
        (lambda x: x.sum().item(), "aten::_local_scalar_dense"),
        (lambda x: bool(x.any()), "aten::_local_scalar_dense"),
        (lambda x: x.nonzero(), "aten::nonzero"),
        (lambda x: x[x > 0], "aten::index"),
        (lambda x: x.masked_select(x > 0), "aten::masked_select"),
        (lambda x: x.unique(), "aten::_unique2"),
        (lambda x: torch.equal(x, x.clone()), "aten::equal"),
    ],
)
def test_the_counter_sees_a_read(read: Callable[[Tensor], Any], name: str) -> None:
    with HostReads() as reads:
        read(torch.ones(3) + 1)
    assert reads.seen == [name]


def test_what_reads_nothing_is_not_counted() -> None:
    x = torch.ones(3)
    with HostReads() as reads:
        torch.where(x > 0, x, 0).masked_fill(x > 0, 1.0)[x.argsort()].clamp(min=x.sum())
    assert reads.seen == []


def small(mixer: str, **changes: Any) -> HopeLM:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 31, "dim": 16, "num_layers": 1, "num_heads": 2, "chunk_size": 4}
    levels = (LevelSpec(name="fast", chunk_size=4), LevelSpec(name="slow", chunk_size=36), LevelSpec())
    return HopeLM(HopeConfig(mixer=mixer, levels=levels, seq_len=18, **sizes, **changes))


def reads_of_steps(model: HopeLM, optim: OptimConfig, packed: bool = False) -> list[str]:
    """What the second and third step of a run look at; the first one makes the state of the optimizer."""
    optimizer = build_optimizer(
        optim, model, slow_levels(model.config, model) if optim.name != "dgd" else None
    )
    guard = UpdateGuard(optimizer, torch.device("cpu"), deferred=True)  # as on CUDA
    tokens = torch.randint(31, (2, 18))
    apart = (torch.arange(17) >= 8).long().expand(2, -1) if packed else None
    reads = HostReads()
    for number in range(3):
        with reads if number else nullcontext():
            optimizer.zero_grad(set_to_none=True)
            logits, _ = model(tokens[:, :-1], documents=apart)
            loss = next_token_loss(logits, tokens[:, 1:], count=34)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            guard.step(loss, norm)
    return reads.seen


@pytest.mark.parametrize("keep_every", [None, 2])
@pytest.mark.parametrize("mixer", MIXERS)
def test_a_training_step_reads_nothing_from_the_device(mixer: str, keep_every: int | None) -> None:
    if keep_every is not None and "memory.keep_every" not in MIXERS[mixer].reads | FAST_LEVEL:
        pytest.skip("it keeps everything")
    model = small(mixer, memory=MemoryConfig(keep_every=keep_every))
    assert reads_of_steps(model, OptimConfig()) == []


@pytest.mark.parametrize("name", [*OPTIMIZERS, *MATRIX_OPTIMIZERS])
def test_no_optimizer_reads_from_the_device(name: str) -> None:
    assert reads_of_steps(small("linear"), OptimConfig(name=name)) == []


@pytest.mark.parametrize("mixer", ["linear", "sliding_attention"])
def test_rows_of_several_documents_are_not_looked_at(mixer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where documents begin is checked on the CPU only, so the check is left out as on CUDA."""

    def unchecked(numbers: Tensor, block: int) -> Documents:
        begins = torch.ones_like(numbers, dtype=torch.bool)
        begins[:, 1:] = numbers[:, 1:] != numbers[:, :-1]
        return Documents(begins.cumsum(1), begins[:, ::block], block)

    monkeypatch.setattr("nested_learning.models.lm.locate_documents", unchecked)
    assert reads_of_steps(small(mixer), OptimConfig(), packed=True) == []


@pytest.mark.parametrize("through", [False, True])
def test_learning_while_reading_looks_at_nothing(through: bool) -> None:
    model = HopeLM(replace(small("linear").config, levels=(LevelSpec(name="fast", chunk_size=4),)))
    tokens = torch.randint(31, (2, 13))
    with HostReads() as reads:
        online_loss(model, tokens, AdaptConfig(chunk_size=4), through, count=24).backward()
    assert reads.seen == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("mixer", MIXERS)
def test_a_step_on_a_card_waits_for_nothing(mixer: str, packed: bool) -> None:
    """torch itself raises where the host waits. (Never run so far: there was no card.)"""
    model = small(mixer).cuda()
    optimizer = build_optimizer(OptimConfig(), model)
    guard = UpdateGuard(optimizer, torch.device("cuda"))
    tokens = torch.randint(31, (2, 18)).pin_memory()
    apart = (torch.arange(17, device="cuda") >= 8).long().expand(2, -1) if packed else None
    for number in range(3):
        torch.cuda.set_sync_debug_mode("error" if number == 2 else "default")
        try:
            batch = tokens.to("cuda", non_blocking=True)
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast("cuda", torch.bfloat16):
                logits, _ = model(batch[:, :-1], documents=apart)
            loss = next_token_loss(logits, batch[:, 1:], count=34)
            loss.backward()
            guard.step(loss, torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert guard.check()
