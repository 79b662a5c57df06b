"""The Continuum Memory System against its token loop, and what every level must keep."""

from __future__ import annotations

import re

import pytest
import torch
from naive_cms import naive_cms
from tolerances import assert_same

from nested_learning.layers.cms import CMS, FastLevel, FastLevelState
from nested_learning.layers.config import MemoryConfig
from nested_learning.layers.mlp import SwiGLU
from nested_learning.levels import VARIANTS, LevelSpec, calendar
from nested_learning.models.config import HopeConfig
from nested_learning.models.lm import HopeLM

DIM, TOKENS = 6, 19
LENGTH = TOKENS * DIM  # operations in a row: tokens that a memory passes, times the width
LIVELY = {"eta_max": 1.0, "eta_bias": 0.0, "alpha_bias": 1.0}  # large steps, fast forgetting
MEMORIES = {
    "default": MemoryConfig(**LIVELY),
    "towards_init": MemoryConfig(**LIVELY, retention_target="init"),
    "momentum": MemoryConfig(**LIVELY, momentum=True),
    "no_delta": MemoryConfig(**LIVELY, delta=False),
}
SWITCHES = {
    "default": {},
    "same": {"target": "same"},
    "projected": {"key": "projected"},
    "projected_same": {"key": "projected", "target": "same"},
    "fixed_eta": {"eta": 0.3},
    "no_norm": {"gain": None},
    "all_fixed": {"eta": 0.3, "retention": False},
    "own_switches": {"retention": False, "delta": False, "momentum": True},
}


def specs(**switches: object) -> tuple[LevelSpec, ...]:
    """A quick and a less quick fast level around a plain one."""
    return (
        LevelSpec(name="quick", chunk_size=2, expansion=1.5, **switches),
        LevelSpec(name="mlp", expansion=1.0),
        LevelSpec(name="fast", chunk_size=6, **switches),
    )


def make(variant: str, memory: str = "default", heads: int = 1, **switches: object) -> CMS:
    torch.manual_seed(0)
    cms = CMS(DIM, specs(**switches), variant, MEMORIES[memory], heads=heads).double()
    with torch.no_grad():
        for name, parameter in cms.named_parameters():
            if name.endswith(("initial_w1", "shares", "rates.weight", "values.weight", "norm.weight")):
                parameter.normal_()
    return cms


def sample(tokens: int = TOKENS, batch: int = 2) -> torch.Tensor:
    return torch.randn(
        batch, tokens, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    ).requires_grad_()


CASES = [(variant, memory, "default") for variant in VARIANTS for memory in MEMORIES]
CASES += [("nested", "default", switch) for switch in SWITCHES if switch != "default"]


@pytest.mark.parametrize("variant, memory, switch", CASES)
def test_outputs_state_and_gradients_equal_the_token_loop(variant: str, memory: str, switch: str) -> None:
    cms = make(variant, memory, heads=2 if variant == "independent" else 1, **SWITCHES[switch])
    inputs = sample()
    y, state = cms(inputs)
    expected, weights = naive_cms(cms, inputs)
    assert_same(y, expected, LENGTH)
    fast = [level.memory for level in state.levels if level is not None]
    moments = [(m.s1[0], m.s2) if m.s1 else () for m in fast]
    ours = [t[:, 0, 0] for m, s in zip(fast, moments, strict=True) for t in (m.w1[0], m.w2, *s)]
    assert_same(ours, weights, LENGTH)
    torch.manual_seed(2)
    weight = torch.randn_like(y)
    wanted = [inputs, *cms.parameters()]
    got = torch.autograd.grad((y * weight).sum(), wanted)
    true = torch.autograd.grad((expected * weight).sum(), wanted)
    assert_same(got, true, LENGTH)
    assert all(g.abs().max() > 0 for g in true)


@pytest.mark.parametrize("variant, memory, switch", CASES)
@pytest.mark.parametrize("cuts", [[5], [3, 4, 11], [6, 12], list(range(1, TOKENS))])
def test_any_split_gives_the_same_answers_and_state(
    variant: str, memory: str, switch: str, cuts: list[int]
) -> None:
    cms, x = make(variant, memory, **SWITCHES[switch]), sample().detach()
    whole, last = cms(x)
    state, parts = None, []
    for first, end in zip([0, *cuts], [*cuts, TOKENS], strict=True):
        y, state = cms(x[:, first:end], state)
        parts.append(y)
    assert_same(torch.cat(parts, 1), whole, LENGTH)
    assert_same(state.tensors(), last.tensors(), LENGTH)
    counts = [[(s.position, s.writes, s.resets) for s in fast(c)] for c in (state, last)]
    assert counts[0] == counts[1]


def fast(state: object) -> list[FastLevelState]:
    return [level for level in state.levels if isinstance(level, FastLevelState)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_changed_token_reaches_no_earlier_output_and_no_other_row(variant: str) -> None:
    cms, x = make(variant), sample().detach()
    before, _ = cms(x)
    for t in (0, 1, 5, 6, 18):
        changed = x.clone()
        changed[0, t] += 1.0
        after, _ = cms(changed)
        assert torch.equal(after[0, :t], before[0, :t])
        assert torch.equal(after[1], before[1])
        assert not torch.equal(after[0, t:], before[0, t:])


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradient_through_the_writes_by_finite_differences(variant: str) -> None:
    """The meta-gradient of every initial memory."""
    cms, x = make(variant), sample(13, 1).detach()
    parameters = {n: p for n, p in cms.named_parameters() if ".initial_" in n or n == "shares"}

    def loss(*values: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(cms, dict(zip(parameters, values, strict=True)), (x,))[0]

    assert torch.autograd.gradcheck(loss, tuple(parameters.values()), atol=1e-6)


def test_nested_levels_forget_when_the_slower_one_is_written() -> None:
    cms, x = make("nested"), sample().detach()
    _, state = cms(x[:, :6])
    quick, slower = fast(state)
    torch.testing.assert_close(quick.memory.w1[0][0, :, 0], cms.levels[0].initial.initial_w1, rtol=0, atol=0)
    assert (slower.memory.w1[0][0, :, 0] - cms.levels[2].initial.initial_w1).abs().max() > 1e-3
    assert [(s.writes, s.resets) for s in (quick, slower)] == [(2, 1), (1, 0)]


def test_only_the_first_context_starts_where_the_state_stands() -> None:
    """Contexts are read side by side in one call, and one after the other in calls as long as they are."""
    cms, x = make("nested"), sample().detach()
    begin = cms.init_state(2)
    changed = begin.map(lambda t: t + 0.1)
    whole, last = cms(x, changed)
    state, parts = changed, []
    for part in x.split(6, 1):
        y, state = cms(part, state)
        parts.append(y)
    assert_same(torch.cat(parts, 1), whole, LENGTH)
    assert_same(state.tensors(), last.tensors(), LENGTH)
    assert not torch.allclose(cms(x, begin)[0][:, :6], whole[:, :6])


@pytest.mark.parametrize("variant", VARIANTS)
def test_counters_are_the_calendar(variant: str) -> None:
    _, state = make(variant)(sample())
    events = calendar(specs(), TOKENS, variant)
    for name, level in zip(("quick", "fast"), fast(state), strict=True):
        kinds = [event.kind for event in events if event.level == name]
        assert (level.writes, level.resets) == (kinds.count("update"), kinds.count("reset"))
        assert level.writes + level.resets == TOKENS // {"quick": 2, "fast": 6}[name]


def test_independent_levels_start_with_equal_shares() -> None:
    torch.manual_seed(0)
    cms, x = CMS(DIM, specs(), "independent").double(), sample().detach()
    outputs = [level(norm(x))[0] for norm, level in zip(cms.norms, cms.levels, strict=True)]
    assert_same(cms(x)[0], x + sum(outputs) / 3, LENGTH)


def test_levels_live_in_the_blocks_they_name() -> None:
    levels = (LevelSpec(name="fast", chunk_size=4, layers=(1,)), LevelSpec())
    lm = HopeLM(HopeConfig(vocab_size=9, dim=8, num_layers=3, num_heads=2, levels=levels))
    assert [len(block.memory.levels) for block in lm.blocks] == [1, 2, 1]
    assert all(isinstance(block.memory.levels[-1], SwiGLU) for block in lm.blocks)


def test_answers_start_with_the_size_of_their_gain() -> None:
    x = torch.randn(3, 7, 4, dtype=torch.float64)
    for gain in (0.1, 2):
        level = FastLevel(4, LevelSpec(chunk_size=4, gain=gain), MemoryConfig(), eps=0.0).double()
        sizes = level(x)[0].square().mean(-1).sqrt()
        torch.testing.assert_close(sizes, torch.full_like(sizes, gain), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "level, message",
    [
        ({"eta": 0.0}, "levels.a.eta must be in (0, 1] or null, got 0.0"),
        ({"chunk_size": 0}, "levels.a.chunk_size must be at least 1, got 0"),
        ({"expansion": -1}, "levels.a.expansion must be positive, got -1"),
        ({"layers": (0, 0)}, "levels.a.layers must be different block numbers from 0, or null, got (0, 0)"),
        ({"layers": ()}, "levels.a.layers must be different block numbers from 0, or null, got ()"),
        ({"gain": 0.0}, "levels.a.gain must be positive or null, got 0.0"),
        ({"key": "output"}, "levels.a.key must be one of input, projected, got 'output'"),
        ({"target": "past"}, "levels.a.target must be one of next, same, got 'past'"),
    ],
)
def test_a_bad_level_is_named(level: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        LevelSpec(name="a", **level)


@pytest.mark.parametrize(
    "model, message",
    [
        ({"cms_variant": "both"}, "model.cms_variant must be one of sequential, nested, independent"),
        ({"cms_per_head": True}, "model.cms_per_head needs model.cms_variant = independent"),
        ({"cms_variant": "nested"}, "chunk sizes of nested fast levels must divide one another, got [4, 6]"),
        ({"seq_len": 0}, "model.seq_len must be at least 1, got 0"),
        ({"num_layers": 1}, "model.levels.b.layers must be less than model.num_layers = 1, got [1]"),
    ],
)
def test_levels_that_do_not_fit_the_model_are_named(model: dict, message: str) -> None:
    levels = (LevelSpec(name="a", chunk_size=4), LevelSpec(name="b", chunk_size=6, layers=(1,)))
    with pytest.raises(ValueError, match=re.escape(message)):
        HopeConfig(**{"levels": levels, "num_layers": 2, **model})


def test_every_block_keeps_a_level() -> None:
    with pytest.raises(ValueError, match="got none for block 0"):
        HopeConfig(levels=(LevelSpec(name="a", layers=(1,)),), num_layers=2)
    with pytest.raises(ValueError, match="CMS variant must be one of sequential, nested, independent"):
        CMS(4, [LevelSpec()], "both")
    with pytest.raises(ValueError, match="heads must divide dim = 4, got 3"):
        CMS(4, [LevelSpec()], "independent", heads=3)
    with pytest.raises(ValueError, match="levels.a.expansion must leave at least one hidden unit of dim = 4"):
        CMS(4, [LevelSpec(name="a", chunk_size=2, expansion=0.1)])
