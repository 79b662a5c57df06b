"""A whole inspection against states and losses of the model itself."""

from __future__ import annotations

import json
import math

import pytest
import torch
from small_models import hope
from torch.nn import functional as F

from nested_learning.inspection import Inspection, inspect_memories
from nested_learning.levels import LevelSpec
from nested_learning.models.lm import HopeLM

TOKENS = 22
FAST = (LevelSpec(name="fast", chunk_size=8), LevelSpec())


def make(mixer: str, levels: tuple[LevelSpec, ...] = (LevelSpec(),)) -> tuple[HopeLM, torch.Tensor]:
    torch.manual_seed(0)
    config = hope(mixer, levels, vocab_size=17, dim=16, num_layers=2, num_heads=2, chunk_size=4)
    return HopeLM(config).double(), torch.randint(17, (TOKENS,))


@pytest.fixture(scope="module")
def seen() -> tuple[HopeLM, torch.Tensor, Inspection]:
    model, tokens = make("self_mod", FAST)
    return model, tokens, inspect_memories(model, tokens)


def test_the_memories_are_named_by_block(seen) -> None:
    names = ["memory", "k", "v", "eta", "alpha", "level:fast"]
    assert [memory.key for memory in seen[2].memories] == [f"{b}.{n}" for b in (0, 1) for n in names]
    assert seen[2]["1.eta"].label == "block 1, M_η"
    with pytest.raises(ValueError, match=r"memory must be one of .*, got '0.keys'"):
        seen[2]["0.keys"]


def test_the_loss_is_that_of_the_model(seen) -> None:
    model, tokens, inspection = seen
    logits = model(tokens[None])[0].detach()
    expected = [float(F.cross_entropy(logits[0, t], tokens[t + 1])) for t in range(TOKENS - 1)]
    assert math.isnan(inspection.loss[0]) and inspection.loss[1:].tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    "key, number, chunk", [("1.memory", 0, 4), ("0.alpha", 4, 4), ("1.level:fast", 0, 8)]
)
def test_changes_are_differences_of_states_of_the_streamed_model(seen, key, number, chunk) -> None:
    model, tokens, inspection = seen
    trace = inspection[key]
    assert trace.ends == tuple(range(chunk, TOKENS + 1, chunk))
    block = int(key[0])

    def weights(state) -> list[torch.Tensor]:
        layer = state.layers[block]
        held = layer.memory.levels[0].memory if "level" in key else layer.mixer.banks[-1 if number else 0]
        # M stands alone in the first bank, if projections have smaller steps
        index = number - 1 if number and len(layer.mixer.banks) == 2 else number
        widths = [w for group in held.w1 for w in group[0].unbind(1)]
        return [held.w2[0, :, index], widths[index]]

    state = model.init_state(1)
    before = start = weights(state)
    for write, parts in enumerate(torch.split(tokens[: trace.ends[-1]], chunk)):
        _, state = model(parts[None], state)
        now = weights(state)
        squares = [sum((a - b).square().sum((-2, -1)) for a, b in zip(*p, strict=True)) for p in
                   ((now, before), (now, start), (now, [0 * w for w in now]))]  # fmt: skip
        change, drift, norm = (s.sqrt().tolist() for s in squares)
        assert trace.change[:, write].tolist() == pytest.approx(change, rel=1e-5)
        assert trace.drift[:, write + 1].tolist() == pytest.approx(drift, rel=1e-5)
        assert trace.norm[:, write + 1].tolist() == pytest.approx(norm, rel=1e-5)
        values = torch.linalg.svdvals(now[0][0])
        p = (values / values.sum()).tolist()
        rank = math.prod(x**-x for x in p)
        assert float(trace.rank["W2"][0, write + 1]) == pytest.approx(rank, rel=1e-5)
        before = now


def test_numbers_over_all_heads(seen) -> None:
    trace = seen[2]["0.memory"]
    squares = [sum(float(x) ** 2 for x in trace.contribution[:, t]) for t in range(TOKENS)]
    assert trace.per_token("contribution")[:20].tolist() == pytest.approx(
        [math.sqrt(s) for s in squares[:20]]
    )
    assert trace.per_token("contribution")[20:].isnan().all()  # of a chunk that is not written yet
    assert trace.per_token("eta").tolist() == pytest.approx([float(c.sum() / 2) for c in trace.eta.T])
    change, norm = (getattr(trace, n)[:, 1].square().sum().sqrt() for n in ("change", "norm"))
    assert float(trace.per_write("relative_change")[1]) == pytest.approx(float(change / norm))
    assert float(trace.per_write("alpha")[2]) == pytest.approx(float(trace.alpha[:, 8:12].mean()))
    most = trace.most_moving(3)
    assert most == sorted(range(20), key=lambda t: -squares[t])[:3]
    with pytest.raises(ValueError, match="did you mean surprise"):
        trace.per_token("suprise")


@pytest.mark.parametrize(
    "mixer, first",
    [
        ("titans", "0.memory"),
        ("linear", "0.linear"),
        ("self_mod_linear", "0.memory"),
        ("attention", "0.level:fast"),
    ],
)
def test_every_kind_of_memory_is_seen(mixer: str, first: str) -> None:
    model, tokens = make(mixer, FAST)
    before = {name: p.clone() for name, p in model.named_parameters()}
    inspection = inspect_memories(model, tokens[None])
    assert inspection.memories[0].key == first and inspection.memories[-1].key == "1.level:fast"
    trace = inspection.memories[0]
    assert (trace.change > 0).all() and (trace.surprise > 0).all()
    if mixer == "linear":  # empty at first, and written token by token
        assert trace.norm[:, 0].tolist() == [0.0, 0.0] and trace.ends[-1] == TOKENS
        assert trace.per_write("relative_change")[0].isnan()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_plain_values_are_json(seen) -> None:
    plain = json.loads(json.dumps(seen[2].to_dict(), allow_nan=False))
    assert plain["loss"][0] is None and plain["tokens"] == seen[1].tolist()
    memory = plain["memories"][0]
    assert memory["contribution"][1][21] is None and memory["ends"] == [4, 8, 12, 16, 20]
    assert memory["rank"]["W2"][1][0] == pytest.approx(float(seen[2]["0.memory"].rank["W2"][1, 0]))


def test_what_cannot_be_inspected_is_told() -> None:
    model, tokens = make("attention")
    with pytest.raises(ValueError, match="model.mixer = attention without fast levels has no memory"):
        inspect_memories(model, tokens)
    model, tokens = make("self_mod", FAST)
    with pytest.raises(ValueError, match="tokens must be at least 4, the shortest chunk of a memory.* got 3"):
        inspect_memories(model, tokens[:3])
    with pytest.raises(ValueError, match="one sequence"):
        inspect_memories(model, tokens.view(2, -1))
    with pytest.raises(ValueError, match="from 0 to 16, got 17"):
        inspect_memories(model, torch.full((8,), 17))
    fast = inspect_memories(model, tokens[:5])["0.level:fast"]  # written never: its chunk is 8
    assert fast.ends == () and fast.change.shape == (1, 0) and fast.norm.shape == (1, 1)
