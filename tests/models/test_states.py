"""States of another model, input of another kind: refused in one line, by models and by layers alone."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import hope
from torch import Tensor, nn

from nested_learning.layers.attention import Attention
from nested_learning.layers.cms import CMS, FastLevel
from nested_learning.layers.config import MemoryConfig
from nested_learning.layers.linear import GatedDeltaRule
from nested_learning.layers.mixer import MIXERS
from nested_learning.layers.mlp import SwiGLU
from nested_learning.layers.self_modifying import SelfModifyingTitans, TitansMemory
from nested_learning.layers.self_modifying_linear import SelfModifyingLinear
from nested_learning.levels import LevelSpec, calendar
from nested_learning.models.block import HopeBlock
from nested_learning.models.lm import HopeLM
from nested_learning.models.nested_mlp import NestedModel
from nested_learning.models.pretrained import levels_from_pretrained
from nested_learning.state import State, load_state

FAST = (LevelSpec(name="fast", chunk_size=4), LevelSpec())


def make(mixer: str = "self_mod", **changes: Any) -> HopeLM:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 11, "dim": 8, "num_layers": 2, "num_heads": 2, "chunk_size": 4}
    return HopeLM(hope(**{**sizes, "mixer": mixer, "levels": FAST, **changes}))


def tokens(batch: int = 2, length: int = 6) -> Tensor:
    return torch.randint(11, (batch, length), generator=torch.Generator().manual_seed(1))


def state_of(model: HopeLM, batch: int = 2) -> State:
    with torch.no_grad():
        state: State = model(tokens(batch))[1]
    return state


@pytest.mark.parametrize("mine", MIXERS)
@pytest.mark.parametrize("other", MIXERS)
def test_a_state_of_another_mixer_is_refused(mine: str, other: str) -> None:
    model, state = make(mine), state_of(make(other))
    if mine == other:
        assert model(tokens(), state)[1].position == 12
        return
    with pytest.raises(ValueError, match=r"state") as error:
        model(tokens(), state)
    assert "\n" not in str(error.value)


MEMORY = ("self_mod", "titans")
CHANGES: list[tuple[tuple[str, ...], dict[str, Any], str]] = [
    (MIXERS, {"num_layers": 3}, "state must be of 2 blocks, got 3"),
    (MIXERS, {"dim": 16}, r"state must hold \[batch, .*\] here, got \[2, "),
    (
        ("attention", "sliding_attention", "linear", "self_mod_linear"),
        {"num_heads": 1},
        r"state must hold \[batch, 2, .*\] here",
    ),
    (MEMORY, {"num_heads": 1}, r"state must hold \[batch, 2, .*\] here"),
    (
        MEMORY,
        {"chunk_size": 2},
        r"state must be of memories with chunk sizes \{'memory': 4.*got \{'memory': 2",
    ),
    (MEMORY, {"memory": MemoryConfig(hidden=6)}, r"state must hold \[batch, 2, .*\] here"),
    (("self_mod_linear",), {"chunk_size": 2}, "state must be of chunk size 4, got one of 2"),
    (
        ("self_mod", "self_mod_linear", "titans", "linear"),
        {"memory": MemoryConfig(momentum=True)},
        "state must be without momenta",
    ),
    (("self_mod", "self_mod_linear", "titans", "linear"), {"conv_window": 3}, "CausalConv state must hold"),
    (("attention", "sliding_attention"), {"conv_window": 3}, "Attention state must be without a convolution"),
    (("self_mod",), {"memory": MemoryConfig(projection_chunk_size=2)}, "'k': 4.*got .*'k': 2"),
    (("self_mod",), {"memory": MemoryConfig(adaptive=("k", "q", "eta", "alpha"))}, "'v': 4.*got .*'q': 4"),
    (("sliding_attention",), {"window": 4}, "Attention state must be of window 5, got one of 4"),
    (MIXERS, {"levels": FAST[1:]}, "CMS state must be of 2 levels, got 1"),
    (MIXERS, {"levels": (*FAST[1:], LevelSpec(name="b"))}, "CMS state has no weights of level 'fast'"),
    (MIXERS, {"levels": FAST[::-1]}, "CMS state has no weights of level 'fast'"),
    (
        MIXERS,
        {"levels": (LevelSpec(name="fast", chunk_size=8), LevelSpec())},
        "FastLevel state must be of chunk size 4, got one of 8",
    ),
    (
        MIXERS,
        {"levels": (LevelSpec(name="fast", chunk_size=4, target="same"), LevelSpec())},
        "FastLevel state must be of a level with target 'next'",
    ),
]


@pytest.mark.parametrize(
    ("mixer", "changes", "message"), [(m, c, t) for mixers, c, t in CHANGES for m in mixers]
)
def test_a_state_of_another_model_is_refused(mixer: str, changes: dict[str, Any], message: str) -> None:
    model, state = make(mixer), state_of(make(mixer, **changes))
    with pytest.raises(ValueError, match=message) as error:
        model(tokens(), state)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_state_of_another_batch_type_or_device_is_refused(mixer: str) -> None:
    model, state = make(mixer), state_of(make(mixer))
    cases: list[tuple[Any, str]] = [
        (state_of(model, 3), "state must have the batch of x, 2, got 3"),
        (state.map(Tensor.double), r"state must be torch\.float32, got torch\.float64"),
        (state.to("meta"), r"state must be on the device of x, cpu, got meta \(state\.to moves it\)"),
        (state.layers[0], "HopeLM takes a ModelState as state, got LayerState"),
        ((1, 2), "HopeLM takes a ModelState as state, got tuple"),
    ]
    for other, message in cases:
        with pytest.raises(ValueError, match=message):
            model(tokens(), other)
    assert torch.isfinite(model(tokens(), state)[0]).all()


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_plain_state_of_another_width_is_refused(mixer: str) -> None:
    """Weights of an ordinary level, where the state holds them (see `adapt`)."""
    wide = (FAST[0], LevelSpec(expansion=1.0))
    state = make(mixer, levels=wide).init_state(2, plain=True)
    with pytest.raises(ValueError, match=r"SwiGLU state must hold \[batch, 48, 8\] here, got \[2, 16, 8\]"):
        make(mixer)(tokens(), state)


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_double_model_starts_from_its_own_state(mixer: str) -> None:
    model = make(mixer).double()
    assert torch.equal(model(tokens(), model.init_state(2))[0], model(tokens())[0])


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "SelfModifyingTitans": lambda: SelfModifyingTitans(8, 2, 4),
    "SelfModifyingLinear": lambda: SelfModifyingLinear(8, 2, 4),
    "TitansMemory": lambda: TitansMemory(8, 2, 4),
    "GatedDeltaRule": lambda: GatedDeltaRule(8, 2, 4),
    "Attention": lambda: Attention(8, 2),
    "CMS": lambda: CMS(8, FAST),
    "FastLevel": lambda: FastLevel(8, FAST[0], MemoryConfig()),
    "HopeBlock": lambda: HopeBlock(make().config),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_alone_refuse_other_input(name: str) -> None:
    layer = LAYERS[name]()
    for wrong, got in (
        (torch.randn(2, 6, 7), "float32 [2, 6, 7]"),
        (torch.randn(6, 8), "float32 [6, 8]"),
        (torch.randn(0, 6, 8), "float32 [0, 6, 8]"),
        (torch.randn(2, 0, 8), "float32 [2, 0, 8]"),
        (torch.zeros(2, 6, 8, dtype=torch.int64), "int64 [2, 6, 8]"),
        ([1.0], "list"),
    ):
        message = f"{name} takes floating-point input [batch, length, 8] with batch and length of at least 1"
        with pytest.raises(ValueError, match=re.escape(f"{message}, got {got}") + "$"):
            layer(wrong)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("other", [*LAYERS, "SwiGLU"])
def test_layers_alone_refuse_states_of_other_layers(name: str, other: str) -> None:
    layer, x = LAYERS[name](), torch.randn(2, 6, 8)
    state = SwiGLU(8, 8).init_state(2) if other == "SwiGLU" else LAYERS[other]()(x)[1]
    if name == other:
        assert layer(x, state)[0].shape == x.shape
        return
    kind = (
        "of memories with chunk sizes"
        if {name, other} <= {"SelfModifyingTitans", "TitansMemory"}
        else "takes"
    )
    with pytest.raises(ValueError, match=f"^{name} .*{kind}"):
        layer(x, state)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: SelfModifyingTitans(8, 3), "SelfModifyingTitans num_heads must divide dim = 8, got 3"),
        (lambda: TitansMemory(8, 0), "TitansMemory num_heads must divide dim = 8, got 0"),
        (lambda: GatedDeltaRule(8, 3), "GatedDeltaRule num_heads must divide dim = 8, got 3"),
        (lambda: GatedDeltaRule(8, 2, 0), "GatedDeltaRule chunk_size must be at least 1, got 0"),
        (lambda: SelfModifyingLinear(8, 3), "SelfModifyingLinear num_heads must divide dim = 8, got 3"),
        (lambda: SelfModifyingLinear(8, 2, 0), "SelfModifyingLinear chunk_size must be at least 1, got 0"),
        (
            lambda: SelfModifyingLinear(8, 2, 4, "later"),
            "SelfModifyingLinear read must be one of chunk, before_write, after_write, got 'later'",
        ),
        (lambda: SelfModifyingTitans(8, 2, 0), "SelfModifyingTitans chunk_size must be at least 1, got 0"),
        (
            lambda: SelfModifyingTitans(8, 2, 4, "later"),
            "SelfModifyingTitans read must be one of chunk, before_write, after_write, got 'later'",
        ),
        (
            lambda: SelfModifyingTitans(8, 2, 4, config=MemoryConfig(projection_chunk_size=3)),
            "projection_chunk_size must divide chunk_size = 4 or be a multiple of it, got 3",
        ),
        (
            lambda: FastLevel(8, LevelSpec(name="a"), MemoryConfig()),
            "levels.a.chunk_size must be a number for a fast level, got None",
        ),
        (lambda: NestedModel(6, 4)(torch.zeros(0, 5, 6)), "not empty, got float32 [0, 5, 6]"),
        (lambda: NestedModel(6, 4)(torch.zeros(2, 0, 6)), "not empty, got float32 [2, 0, 6]"),
        (lambda: NestedModel(6, 4)(torch.zeros(2, 5, 6).long()), "not empty, got int64 [2, 5, 6]"),
        (lambda: levels_from_pretrained("gpt2", [LevelSpec()]), "hf_model must be a loaded model, got str"),
        (lambda: calendar([LevelSpec()], 2.5), "tokens must be an integer of at least 1, got 2.5"),
        (lambda: make().init_state(0), "batch must be an integer of at least 1, got 0"),
    ],
)
def test_layers_that_cannot_be_built_or_used_say_why(build: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        build()


BAD_TOKENS: list[tuple[Any, type[Exception], str]] = [
    ([[1, 2], [3]], TypeError, "tokens must be a tensor [batch, length], got list"),
    ("text", TypeError, "tokens must be a tensor [batch, length], got str"),
    (torch.zeros(2, 3), TypeError, "tokens must be int64 or int32, got torch.float32"),
    (torch.zeros(3, dtype=torch.int64), ValueError, "of at least 1, got [3]"),
    (torch.zeros(1, 2, 3, dtype=torch.int64), ValueError, "of at least 1, got [1, 2, 3]"),
    (torch.zeros(0, 3, dtype=torch.int64), ValueError, "of at least 1, got [0, 3]"),
    (torch.zeros(2, 0, dtype=torch.int64), ValueError, "of at least 1, got [2, 0]"),
    (torch.tensor([[1, 11]]), ValueError, "tokens must be from 0 to 10, got 11"),
    (torch.tensor([[1, -1]], dtype=torch.int32), ValueError, "tokens must be from 0 to 10, got -1"),
]


@pytest.mark.parametrize(("wrong", "kind", "message"), BAD_TOKENS)
def test_tokens_of_another_kind_are_refused(wrong: Any, kind: type[Exception], message: str) -> None:
    model = make("attention")
    calls = [lambda: model(wrong), lambda: model.generate(wrong, 0)]
    for call in calls[: 2 if isinstance(wrong, Tensor) else 1]:  # lists are prompts of any lengths
        with pytest.raises(kind, match=re.escape(message)):
            call()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": -1}, "max_new_tokens must be an integer of at least 0, got -1"),
        ({"max_new_tokens": 2.0}, "max_new_tokens must be an integer of at least 0, got 2.0"),
        ({"max_new_tokens": True}, "max_new_tokens must be an integer of at least 0, got True"),
        ({"temperature": float("nan")}, "temperature must be at least 0 and finite, got nan"),
        ({"temperature": -1}, "temperature must be at least 0 and finite, got -1"),
        ({"temperature": "hot"}, "temperature must be at least 0 and finite, got 'hot'"),
        ({"top_k": 0}, "top_k must be at least 1 or None, got 0"),
        ({"top_k": 2.5}, "top_k must be at least 1 or None, got 2.5"),
        ({"top_p": 0.0}, "top_p must be in (0, 1] or None, got 0.0"),
        ({"top_p": float("nan")}, "top_p must be in (0, 1] or None, got nan"),
        ({"top_p": "all"}, "top_p must be in (0, 1] or None, got 'all'"),
        ({"seed": 1.5}, "seed must be an integer of 64 bits or None, got 1.5"),
        ({"seed": "one"}, "seed must be an integer of 64 bits or None, got 'one'"),
        ({"seed": 2**64}, "seed must be an integer of 64 bits or None, got 18446744073709551616"),
    ],
)
def test_generate_names_what_it_cannot_use(options: dict[str, Any], message: str) -> None:
    model = make("attention")
    with pytest.raises(ValueError, match=re.escape(message)):
        model.generate(tokens(), **{"max_new_tokens": 0, **options})


def test_generate_takes_what_has_one_meaning() -> None:
    model, text = make("attention"), tokens()
    assert torch.equal(model.generate(text, 0), text)
    one, all_of_them = (model.generate(text, 3, top_k=k, seed=5) for k in (11, 99))
    assert torch.equal(one, all_of_them)


def test_rows_and_replacements_are_checked() -> None:
    state = state_of(make())
    for index in (
        [0, 1],
        torch.tensor([0.0]),
        torch.tensor([True, False]),
        torch.tensor(1),
        torch.tensor([]).long(),
    ):
        with pytest.raises(ValueError, match=r"^index must be a tensor \[N\] of row numbers, got "):
            state.rows(index)  # type: ignore[arg-type]
    name, held = next(iter(state.named_tensors().items()))
    with pytest.raises(ValueError, match=rf"ModelState holds {name} of shape .*, got \[2, 3\]"):
        state.replace({name: torch.zeros(2, 3)})
    assert torch.equal(state.replace({name: held + 1}).named_tensors()[name], held + 1)


def test_files_that_are_no_state_are_refused_by_name(tmp_path: Path) -> None:
    state = state_of(make())
    good = tmp_path / "good.pt"
    state.save(good)
    assert load_state(good).layers[0].mixer.chunks == state.layers[0].mixer.chunks

    packed = torch.load(good, weights_only=True)
    layer = packed["state"]["fields"]["layers"][0]["fields"]["mixer"]
    files: dict[str, tuple[Any, str]] = {
        "cut.pt": (good.read_bytes()[:-100], "is no state written by State.save, or is cut off"),
        "text.pt": (b"not a state", "is no state written by State.save, or is cut off"),
        "empty.pt": (b"", "is no state written by State.save, or is cut off"),
        "weights.pt": ({"a": torch.zeros(2)}, "is no state written by State.save of version 2"),
        "tensor.pt": (torch.zeros(2), "is no state written by State.save of version 2"),
        "older.pt": ({**packed, "version": 1}, "is a state of version 1, read is version 2"),
        "unknown.pt": (
            {**packed, "state": {"state": "GateState", "fields": {}}},
            "holds a GateState, which nothing that is imported defines",
        ),
    }
    for name, (content, message) in files.items():
        path = tmp_path / name
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        with pytest.raises(ValueError, match=re.escape(f"{path} {message}")):
            load_state(path)
    del layer["fields"]["chunks"]
    torch.save(packed, tmp_path / "older.pt")
    with pytest.raises(
        ValueError, match=r"older\.pt is of another version: its SelfModState lacks field 'chunks'"
    ):
        load_state(tmp_path / "older.pt")
    layer["fields"] |= {"chunks": [], "gates": None}
    torch.save(packed, tmp_path / "stranger.pt")
    with pytest.raises(ValueError, match="its SelfModState has an unknown field 'gates'"):
        load_state(tmp_path / "stranger.pt")
    with pytest.raises(FileNotFoundError, match="no state file"):
        load_state(tmp_path / "none.pt")
    with pytest.raises(FileNotFoundError, match="no folder"):
        state.save(tmp_path / "none" / "state.pt")


class Payload:
    """Runs code where it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("payload-ran"),))


def test_a_state_file_runs_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"format": "nested_learning.state", "version": 2, "state": Payload()}, tmp_path / "bad.pt")
    with pytest.raises(ValueError, match=r"bad\.pt cannot be read as a state: "):
        load_state(tmp_path / "bad.pt")
    assert not (tmp_path / "payload-ran").exists()


@pytest.mark.parametrize("mixer", ["self_mod", "self_mod_linear", "titans", "linear"])
def test_momenta_of_another_shape_are_refused(mixer: str) -> None:
    model = make(mixer, memory=MemoryConfig(momentum=True), levels=(LevelSpec(),))
    state = state_of(model)
    layers = list(state.layers)
    mixer_state = layers[0].mixer
    if mixer in ("linear", "self_mod_linear"):
        wrong = replace(mixer_state, momentum=mixer_state.momentum[..., :1])
    else:
        bank = replace(mixer_state.banks[0], s2=mixer_state.banks[0].s2[..., :1])
        wrong = replace(mixer_state, banks=(bank,))
    layers[0] = replace(layers[0], mixer=wrong)
    with pytest.raises(ValueError, match=r"state must hold \[batch, .*\] here"):
        model(tokens(), replace(state, layers=tuple(layers)))
