"""Every variant with every mix of plain, fast and slow levels: built, trained, streamed, planned, audited."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest
import torch
from naive_cms import naive_cms

from nested_learning.layers.cms import CMS, FastLevelState
from nested_learning.layers.config import MemoryConfig
from nested_learning.levels import VARIANTS, LevelSpec, calendar, reset_periods
from nested_learning.models.config import HopeConfig
from nested_learning.models.lm import HopeLM
from nested_learning.train import audit
from nested_learning.train.config import RunConfig, TrainConfig
from nested_learning.train.plan import count_block, optimizer_numbers

DIM, TOKENS, SEQ_LEN = 4, 9, 16
LIVELY = MemoryConfig(eta_max=1.0, eta_bias=0.0, alpha_bias=1.0)
PERIODS = {"plain": None, "mlp": None, "quick": 2, "steady": 4, "slow": 32, "slower": 64}
MIXES = [
    ("plain",),
    ("quick",),
    ("slow",),
    ("plain", "mlp"),
    ("plain", "quick"),
    ("quick", "plain"),
    ("plain", "slow"),
    ("slow", "plain"),
    ("quick", "slow"),
    ("slow", "quick"),
    ("slow", "slower"),
    ("quick", "steady"),
    ("steady", "quick"),
    ("quick", "plain", "slow"),
    ("slow", "steady", "plain", "quick"),
]


def specs(names: Sequence[str], **layers: tuple[int, ...]) -> tuple[LevelSpec, ...]:
    return tuple(
        LevelSpec(name=name, chunk_size=PERIODS[name], expansion=1.0, layers=layers.get(name))
        for name in names
    )


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("names", MIXES, ids="-".join)
def test_every_mix_equals_the_token_loop_and_streams(variant: str, names: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    cms = CMS(DIM, specs(names), variant, LIVELY, seq_len=SEQ_LEN).double()
    with torch.no_grad():
        for name, parameter in cms.named_parameters():
            if name.endswith(("initial_w1", "shares", "rates.weight")):
                parameter.normal_()
    x = torch.randn(2, TOKENS, DIM, dtype=torch.float64, requires_grad=True)
    y, last = cms(x)
    expected, _ = naive_cms(cms, x)
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-10)
    weight = torch.randn_like(y)
    wanted = [x, *cms.parameters()]
    ours = torch.autograd.grad((y * weight).sum(), wanted)
    theirs = torch.autograd.grad((expected * weight).sum(), wanted)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)

    state, parts = None, []
    for t in range(TOKENS):
        part, state = cms(x[:, t : t + 1], state)
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts, 1), y, rtol=1e-10, atol=1e-11)
    assert state is not None
    for a, b in zip(state.tensors(), last.tensors(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)

    events = calendar(specs(names), TOKENS, variant, seq_len=SEQ_LEN)
    for name, level in zip(names, last.levels, strict=True):
        kinds = [event.kind for event in events if event.level == name]
        if isinstance(level, FastLevelState):
            assert (level.writes, level.resets) == (kinds.count("update"), kinds.count("reset"))
            assert level.writes + level.resets == TOKENS // (PERIODS[name] or 1)
        else:
            assert level is None and not kinds


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "levels",
    [
        *(specs(names) for names in MIXES),
        specs(("quick", "plain"), quick=(1,)),
        specs(("quick", "plain"), quick=(0,), plain=(1,)),
        specs(("quick", "steady", "plain"), quick=(0, 1), steady=(1,), plain=(0,)),
        specs(("quick", "slow", "plain"), quick=(0,), slow=(1,), plain=(0, 1)),
    ],
    ids=lambda levels: "-".join(f"{s.name}{'' if s.layers is None else list(s.layers)}" for s in levels),
)
def test_every_mix_of_a_model_does_what_it_plans(variant: str, levels: tuple[LevelSpec, ...]) -> None:
    model = HopeConfig(
        vocab_size=11, dim=4, num_layers=2, num_heads=1, mixer="attention", levels=levels,
        cms_variant=variant, seq_len=SEQ_LEN,
    )  # fmt: skip
    result = audit.audit(RunConfig(model=model, train=TrainConfig(seq_len=SEQ_LEN, batch_size=1)))
    assert result.ok, result.checks
    fast = sum(model.level_kind(spec) == "fast" for layer in (0, 1) for spec in model.levels_of(layer))
    slow = sum(model.level_kind(spec) == "slow" for spec in levels)
    assert len(result.checks) == fast + slow


def test_the_period_of_a_reset_is_that_of_the_next_slower_level_of_the_block() -> None:
    levels = specs(("quick", "steady", "plain"), steady=(1,))
    model = HopeConfig(num_layers=2, levels=levels, cms_variant="nested", seq_len=8)
    of = {layer: [(e.token, e.level, e.kind) for e in model.calendar(8, layer)] for layer in (0, 1)}
    step = (8, "plain", "step")
    assert of[0] == [*((t, "quick", "update") for t in (2, 4, 6, 8)), step]
    assert of[1] == [
        (2, "quick", "update"), (4, "quick", "reset"), (4, "steady", "update"), (6, "quick", "update"),
        (8, "quick", "reset"), (8, "steady", "update"), step,
    ]  # fmt: skip
    together = [(e.token, e.level, e.kind) for e in model.calendar(8)]
    assert sorted(together) == sorted({*of[0], *of[1]})  # an event of several blocks is listed once
    assert [token for token, _, _ in together] == sorted(token for token, _, _ in together)


def test_levels_of_different_blocks_need_not_divide_one_another() -> None:
    levels = (LevelSpec(name="a", chunk_size=4, layers=(0,)), LevelSpec(name="b", chunk_size=6, layers=(1,)))
    model = HopeConfig(num_layers=2, levels=levels, cms_variant="nested", seq_len=24)
    tokens = [(e.token, e.level) for e in model.calendar(12)]
    assert tokens == [(4, "a"), (6, "b"), (8, "a"), (12, "a"), (12, "b")]


def test_a_plan_counts_the_levels_of_every_block() -> None:
    levels = specs(("quick", "plain", "slow"), quick=(0,), slow=(2,))
    model = HopeConfig(
        vocab_size=300, dim=16, num_layers=3, num_heads=2, levels=levels, seq_len=SEQ_LEN, chunk_size=4
    )
    config = RunConfig(model=model, train=TrainConfig(seq_len=SEQ_LEN, batch_size=1))
    lm = HopeLM(model)
    counted = [count_block(config, layer) for layer in range(3)]
    assert [b.parameters for b in counted] == [sum(p.numel() for p in b.parameters()) for b in lm.blocks]
    assert sum(b.fast for b in counted) == lm.init_state(1).numel()
    assert 0 < optimizer_numbers(config) <= 4


def test_levels_without_fast_ones_never_reset() -> None:
    assert reset_periods(specs(("plain", "slow")), "nested", SEQ_LEN) == [None, None]
    assert reset_periods([], "nested") == []
    assert reset_periods(specs(("steady", "plain", "quick")), "nested") == [None, None, 4]


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_level_and_equal_names_are_refused(variant: str) -> None:
    with pytest.raises(ValueError, match=r"^levels must hold at least one level$"):
        CMS(DIM, [], variant)
    with pytest.raises(ValueError, match=re.escape("levels must have different names, got ['a', 'a']")):
        CMS(DIM, [LevelSpec(name="a"), LevelSpec(name="a", chunk_size=4)], variant)
    with pytest.raises(ValueError, match=r"^levels must hold LevelSpec, got dict$"):
        CMS(DIM, [{"name": "a"}], variant)  # type: ignore[list-item]


def test_the_last_update_of_a_sequence_comes_before_its_reset() -> None:
    model = HopeConfig(num_layers=2, levels=specs(("steady", "quick")), seq_len=4)
    assert [(e.level, e.kind) for e in model.calendar(8) if e.token == 4] == [
        ("steady", "update"), ("steady", "reset"), ("quick", "update"), ("quick", "reset"),
    ]  # fmt: skip
