"""What every model of the library keeps: streaming, causality, one memory per row, gradients everywhere."""

from __future__ import annotations

from typing import Any
from weakref import ref

import pytest
import torch
from small_models import hope
from tolerances import assert_same
from torch.nn import functional as F

from nested_learning.layers.config import MemoryConfig
from nested_learning.layers.mixer import MIXERS
from nested_learning.levels import LevelSpec
from nested_learning.models.config import HopeConfig
from nested_learning.models.lm import HopeLM

INSIDE = ("self_mod", "self_mod_linear", "titans")  # mixers that can be read inside a chunk
LENGTH = 2 * 19 * 16  # operations in a row: layers, tokens that a memory passes, width
FAST = (LevelSpec(name="fast", chunk_size=4), LevelSpec(name="slow"))


def model(mixer: str, levels: tuple[LevelSpec, ...] = FAST, **options: object) -> HopeLM:
    torch.manual_seed(0)
    memory = options.pop("memory", MemoryConfig(eta_max=1.0, eta_bias=0.0, alpha_bias=1.0))
    config = hope(
        vocab_size=29, dim=16, num_layers=2, num_heads=2, mixer=mixer, levels=levels, chunk_size=4, window=5,
        memory=memory, **options,
    )  # fmt: skip
    return HopeLM(config).double()


def tokens(length: int = 19, batch: int = 2) -> torch.Tensor:
    return torch.randint(29, (batch, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("cuts", [[5], [3, 4, 11], list(range(1, 19))])
def test_any_split_gives_the_same_logits(mixer: str, cuts: list[int]) -> None:
    lm, x = model(mixer), tokens()
    whole, _ = lm(x)
    state, parts = None, []
    for first, end in zip([0, *cuts], [*cuts, 19], strict=True):
        y, state = lm(x[:, first:end], state)
        parts.append(y)
    assert_same(torch.cat(parts, 1), whole, LENGTH)
    assert state.position == 19


@pytest.mark.parametrize(
    "mixer, read",
    [*((mixer, "chunk") for mixer in MIXERS), *((mixer, "after_write") for mixer in INSIDE)],
)
def test_a_changed_token_reaches_no_earlier_output_and_no_other_row(mixer: str, read: str) -> None:
    lm, x = model(mixer, read=read), tokens()
    before, _ = lm(x)
    for t in (0, 3, 4, 10, 18):
        changed = x.clone()
        changed[0, t] = (changed[0, t] + 1) % 29
        after, _ = lm(changed)
        assert torch.equal(after[0, :t], before[0, :t])
        assert torch.equal(after[1], before[1])
        assert not torch.equal(after[0, t:], before[0, t:])


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("tie", [True, False])
def test_every_parameter_gets_a_gradient(mixer: str, tie: bool) -> None:
    lm, x = model(mixer, tie_embeddings=tie), tokens(20, 4)
    logits, _ = lm(x[:, :-1])
    F.cross_entropy(logits.flatten(0, 1), x[:, 1:].flatten()).backward()
    missing = [n for n, p in lm.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    assert not missing


def test_attention_and_one_plain_level_are_a_transformer() -> None:
    """Against a Transformer written out with torch functions on the same weights."""
    lm, x = model("attention", levels=(LevelSpec(),)), tokens()
    h = F.embedding(x, lm.embedding.weight)

    def rms(y: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight

    def rope(y: torch.Tensor) -> torch.Tensor:  # [B, H, T, d]
        half = y.shape[-1] // 2
        angle = torch.arange(19.0).double()[:, None] * 10_000.0 ** (-torch.arange(half).double() / half)
        a, b = y[..., :half], y[..., half:]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)

    for block in lm.blocks:
        qkv = rms(h, block.norm.weight) @ block.mixer.w_qkv.weight.T
        q, k, v = qkv.view(2, 19, 3, 2, 8).permute(2, 0, 3, 1, 4)
        scores = rope(q) @ rope(k).mT / 8**0.5
        future = torch.ones(19, 19, dtype=torch.bool).triu(1)
        mixed = scores.masked_fill(future, -torch.inf).softmax(-1) @ v
        h = h + mixed.transpose(1, 2).flatten(2) @ block.mixer.w_out.weight.T
        level = block.memory.levels[0]
        gate, up = (rms(h, block.memory.norms[0].weight) @ level.w_in.weight.T).chunk(2, -1)
        h = h + (F.silu(gate) * up) @ level.w_out.weight.T
    expected = rms(h, lm.norm.weight) @ lm.embedding.weight.T
    assert_same(lm(x)[0], expected, LENGTH)


STATES: dict[str, tuple[int, dict[str, object]]] = {
    "self_mod": (4, {}),
    "self_mod_linear": (4, {}),
    "titans": (4, {}),
    "linear": (1, {}),
    "linear and fast": (
        6,
        {"levels": (LevelSpec(name="a", chunk_size=2), LevelSpec(name="b", chunk_size=3))},
    ),
    "self_mod and fast": (12, {"levels": (LevelSpec(name="fast", chunk_size=6),)}),
    "self_mod and long projections": (8, {"memory": MemoryConfig(projection_chunk_size=8)}),
    "self_mod and nested": (
        8,
        {
            "levels": (LevelSpec(name="a", chunk_size=2), LevelSpec(name="b", chunk_size=8)),
            "cms_variant": "nested",
        },
    ),
}


@pytest.mark.parametrize("name", STATES)
def test_shapes_of_a_state_repeat_after_a_cycle_and_not_before(name: str) -> None:
    """So the state of a long context holds as many numbers as that of a short one."""
    cycle, options = STATES[name]
    lm, state, shapes = model(name.split()[0], **{"levels": (LevelSpec(),), **options}), None, []  # type: ignore[arg-type]
    assert lm.config.cycle == cycle
    with torch.no_grad():
        for token in tokens(2 * cycle + 2, 1).split(1, 1):
            _, state = lm(token, state)
            shapes.append({name: t.shape for name, t in state.named_tensors().items()})
        _, later = lm(tokens(25 * cycle, 1), state)
    assert {name: t.shape for name, t in later.named_tensors().items()} == shapes[-1]
    for period in range(1, cycle + 1):
        repeats = all(a == b for a, b in zip(shapes, shapes[period:], strict=False))
        assert repeats == (period == cycle)


def test_the_state_of_the_prompt_is_let_go() -> None:
    """Generation holds one state, and not that of the prompt beside it."""
    lm, x, weights, alive = model("self_mod"), tokens(8), [], []

    def look(module: object, arguments: object, result: tuple[torch.Tensor, Any]) -> None:
        weights.append(ref(result[1].layers[0].mixer.banks[0].w2))
        alive.append(sum(found() is not None for found in weights))

    lm.register_forward_hook(look)
    lm.generate(x, 5)
    assert alive == [1, 2, 2, 2, 2]  # that which was read, and the new one


@pytest.mark.parametrize("mixer", MIXERS)
def test_greedy_generation_equals_rereading_the_whole_text(mixer: str) -> None:
    lm, x = model(mixer), tokens(6)
    generated = lm.generate(x, 9, temperature=0)
    expected = x
    for _ in range(9):
        with torch.no_grad():
            expected = torch.cat([expected, lm(expected)[0][:, -1:].argmax(-1)], 1)
    assert torch.equal(generated, expected)
    assert torch.equal(lm.generate(x, 9, temperature=0, prefill=4), expected)  # the prompt in two parts


def test_a_long_prompt_is_read_in_parts() -> None:
    """No call sees more tokens than asked for, none begins inside of a chunk, no token is read twice."""
    lm, x, read = model("self_mod"), tokens(11), []
    lm.register_forward_pre_hook(lambda module, arguments: read.append(arguments[0].shape[1]))
    assert torch.equal(lm.generate(x, 0, prefill=4), x) and not read
    for most, parts in ((4, [4, 4, 3]), (7, [4, 4, 3]), (9, [8, 3]), (3, [3, 3, 3, 2]), (99, [11])):
        read.clear()
        lm.generate(x, 2, prefill=most)
        assert read == [*parts, 1]
    with pytest.raises(ValueError, match="prefill must be an integer of at least 1, got 0"):
        lm.generate(x, 2, prefill=0)


@pytest.mark.parametrize("mixer", MIXERS)
def test_init_state_is_the_start_of_a_context(mixer: str) -> None:
    lm, x = model(mixer), tokens()
    assert torch.equal(lm(x, lm.init_state(2))[0], lm(x)[0])


def test_sampling_is_seeded() -> None:
    lm, x = model("self_mod"), tokens(6)
    draws = [lm.generate(x, 12, top_k=20, top_p=0.95, seed=seed) for seed in (3, 3, 4)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize("mixer", ["self_mod", "self_mod_linear", "titans", "linear"])
def test_state_of_memory_mixers_does_not_grow(mixer: str) -> None:
    lm = model(mixer)
    with torch.no_grad():
        sizes = {lm(tokens(n, 1))[1].numel() for n in (8, 64, 512)}  # multiples of the chunk: nothing pending
    assert len(sizes) == 1


def test_state_is_saved_forked_and_reordered(tmp_path: object) -> None:
    from nested_learning.state import load_state

    lm, x = model("self_mod"), tokens()
    with torch.no_grad():
        _, state = lm(x[:, :10])
        expected, _ = lm(x[:, 10:], state)
        state.save(f"{tmp_path}/memory.pt")
        again, _ = lm(x[:, 10:], load_state(f"{tmp_path}/memory.pt"))
        swapped, _ = lm(x[[1, 0], 10:], state.rows(torch.tensor([1, 0])))
    assert torch.equal(again, expected)
    assert_same(swapped, expected[[1, 0]], LENGTH)


def test_same_seed_same_weights() -> None:
    for a, b in zip(model("self_mod").parameters(), model("self_mod").parameters(), strict=True):
        assert torch.equal(a, b)


def test_bad_input_is_refused_in_one_sentence() -> None:
    lm = model("self_mod")
    with pytest.raises(ValueError, match="length of at least 1"):
        lm(torch.zeros(2, 0, dtype=torch.int64))
    with pytest.raises(TypeError, match="int64 or int32, got torch.float32"):
        lm(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="must divide"):
        HopeConfig(chunk_size=8, memory=MemoryConfig(projection_chunk_size=3))
    with pytest.raises(ValueError, match=r"model\.mixer must be one of"):
        HopeConfig(mixer="mamba")
    with pytest.raises(ValueError, match="num_heads must divide"):
        HopeConfig(dim=100, num_heads=3)
