"""Generation by captured steps gives what eager steps give.

Without a card, `capture` is replaced by one that runs the function at every replay, over the same tensors.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any
from weakref import ref

import pytest
import torch
from small_models import hope
from tolerances import assert_same
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from nested_learning.graphs import WARM_UP
from nested_learning.layers.config import MemoryConfig
from nested_learning.levels import LevelSpec
from nested_learning.models import decode, lm
from nested_learning.models.decode import Decoder
from nested_learning.models.lm import HopeLM
from nested_learning.state import LayerState, ModelState

LENGTH = 2 * 40 * 8  # operations in a row: layers, tokens that a memory passes, width
FAST, FASTER = LevelSpec(name="fast", chunk_size=8), LevelSpec(name="faster", chunk_size=4)
MODELS: dict[str, dict[str, Any]] = {
    "self_mod": {"mixer": "self_mod"},
    "self_mod_linear": {"mixer": "self_mod_linear"},
    "titans": {"mixer": "titans"},
    "linear": {"mixer": "linear"},
    "fast levels": {"mixer": "self_mod", "levels": (FASTER, FAST)},
    "nested levels": {"mixer": "titans", "levels": (FASTER, FAST), "cms_variant": "nested"},
    "momentum": {"mixer": "self_mod", "memory": MemoryConfig(momentum=True)},
    "two chunk sizes": {"mixer": "self_mod", "memory": MemoryConfig(projection_chunk_size=8)},
    "no convolution": {"mixer": "self_mod", "conv_window": 1},
    "a chunk of one": {"mixer": "self_mod", "chunk_size": 1},
    "read inside": {
        "mixer": "titans",
        "read": "after_write",
        "memory": MemoryConfig(retention_target="init"),
    },
}


class Pretended:
    """A `Replay` that runs the function again, and writes to one result."""

    def __init__(self, run: Callable[[], Tensor]) -> None:
        self.run, self.pool = run, object()
        self.result: Tensor | None = None

    def __call__(self) -> Tensor:
        new = self.run()
        self.result = new.clone() if self.result is None else self.result.copy_(new)
        return self.result


def pretend(run: Callable[[], Any], device: Any, warm_up: Any = None, pool: Any = None) -> Pretended:
    """`capture`: as on a card, `run` itself runs to warm up where nothing else is to, and else not yet."""
    for _ in range(WARM_UP if warm_up is None else 1):
        (warm_up or run)()
    return Pretended(run)


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "capture", pretend)


def on_graphs(monkeypatch: pytest.MonkeyPatch, yes: bool) -> None:
    monkeypatch.setattr(lm, "why_no_decoder", lambda *arguments: None if yes else "not now")


def make(name: str) -> HopeLM:
    torch.manual_seed(0)
    return HopeLM(
        hope(**{"vocab_size": 17, "dim": 8, "num_layers": 2, "num_heads": 2, "chunk_size": 4, **MODELS[name]})
    )


@pytest.mark.parametrize("name", MODELS)
def test_captured_steps_equal_eager_steps(name: str, captured: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """From prompts that end in several phases, each for more than three cycles, greedily and sampled."""
    model = make(name)
    tokens = torch.randint(17, (2, 11), generator=torch.Generator().manual_seed(1))
    for length in (11, 8):
        for options in ({"temperature": 0}, {"seed": 3, "top_k": 9}):
            prompt, count = tokens[:, :length], 3 * model.config.cycle + 3
            on_graphs(monkeypatch, True)
            found = model.generate(prompt, count, **options)  # type: ignore[arg-type]
            on_graphs(monkeypatch, False)
            assert torch.equal(found, model.generate(prompt, count, **options))  # type: ignore[arg-type]
    _, decoder = decode._decoders[model]
    assert len(decoder.steps) == model.config.cycle


@pytest.mark.parametrize("length", [5, 8])
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_state_are_those_of_eager_steps(name: str, length: int, captured: None) -> None:
    """Any tokens, for more than three cycles; from the middle of a cycle and from its start. (What a small
    model writes itself soon repeats, whatever its memories hold.)"""
    model = make(name).double()
    cycle = model.config.cycle
    numbers = torch.Generator().manual_seed(1)
    prompt, tokens = (torch.randint(17, (2, n), generator=numbers) for n in (length, 3 * cycle + 3))
    decoder = Decoder(model, cycle)
    with torch.no_grad():
        _, state = model(prompt)
        decoder.start(state, tokens[:, :1])
        for token in tokens.split(1, 1):
            found = decoder(token)
            expected, state = model(token, state)
            assert_same(found, expected, LENGTH)
        assert len(decoder.steps) == cycle
        held = decoder.held(decoder.phase)
        assert held.named_tensors().keys() == state.named_tensors().keys()
        assert_same(held.tensors(), state.tensors(), LENGTH)
        assert_same(model(tokens, held)[0], model(tokens, state)[0], LENGTH)


def test_buffers_stay_where_they_are_and_hold_one_state(
    captured: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make("fast levels")
    on_graphs(monkeypatch, True)
    prompt = torch.zeros(1, 8, dtype=torch.int64)
    model.generate(prompt, 20, temperature=0)
    _, decoder = decode._decoders[model]

    def places() -> dict[str, int]:
        return {name: buffer.data_ptr() for name, buffer in decoder.buffers.items()}

    before = places()
    model.generate(prompt[:, :5], 100, temperature=0)
    assert places() == before
    assert {t.data_ptr() for t in decoder.held(3).tensors()} <= set(before.values())
    with torch.no_grad():
        largest = max(model(prompt[:, :n])[1].numel() for n in range(1, 9))
    most = {
        "layers.0.mixer": 3,
        "layers.0.memory.levels.0": 3,
        "layers.0.memory.levels.1": 7,
    }  # pending tokens
    assert largest <= sum(buffer.numel() for buffer in decoder.buffers.values()) < 1.2 * largest
    for name, count in most.items():
        assert decoder.buffers[f"{name}.pending.0"].numel() == 8 * count


def test_short_texts_from_many_places_keep_nothing(captured: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """But the shapes they saw: no copy of a state for every phase that a text began in."""
    model = make("fast levels")
    on_graphs(monkeypatch, True)
    for length in range(8, 2, -1):
        model.generate(torch.zeros(1, length, dtype=torch.int64), 2, temperature=0)
    _, decoder = decode._decoders[model]
    assert len(decoder.frames) == 6 and not decoder.buffers
    assert all(t.is_meta for frame in decoder.frames.values() for t in frame.tensors())


def test_a_decoder_does_not_keep_its_model_alive(captured: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("titans")
    on_graphs(monkeypatch, True)
    model.generate(torch.zeros(1, 3, dtype=torch.int64), 13, temperature=0)
    alive, count = ref(model), len(decode._decoders)
    del model
    gc.collect()
    assert alive() is None and len(decode._decoders) < count


def test_inference_mode_has_a_decoder_of_its_own(captured: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("titans")
    on_graphs(monkeypatch, True)
    prompt = torch.zeros(1, 3, dtype=torch.int64)
    with torch.inference_mode():
        found = model.generate(prompt, 13, temperature=0)
    assert torch.equal(model.generate(prompt, 13, temperature=0), found)


class Swapping(nn.Module):
    """A model whose state is two tensors, which change places at every token."""

    def forward(self, token: Tensor, state: ModelState) -> tuple[Tensor, ModelState]:
        (layer,) = state.layers
        return layer.mixer + token, ModelState((LayerState(layer.memory, layer.mixer),), state.position + 1)


def test_a_state_may_hold_what_it_held_in_another_place(captured: None) -> None:
    model, token = Swapping(), torch.zeros(1, 1, dtype=torch.int64)
    decoder = Decoder(model, 2)
    decoder.start(ModelState((LayerState(torch.ones(1, 1), torch.full((1, 1), 2.0)),)), token)
    assert [decoder(token).item() for _ in range(7)] == [1, 2, 1, 2, 1, 2, 1]


def test_a_state_whose_shapes_do_not_repeat_is_refused(captured: None) -> None:
    model = make("self_mod")
    token = torch.zeros(1, 1, dtype=torch.int64)
    decoder = Decoder(model, 3)  # chunks have 4 tokens
    with torch.no_grad():
        decoder.start(model(token)[1], token)
        with pytest.raises(RuntimeError, match="do not repeat every 3 tokens"):
            for _ in range(4):
                decoder(token)


class Operations(TorchDispatchMode):
    """Names of all operations, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func._schema.name)
        return func(*args, **(kwargs or {}))


WAITS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::index")


@pytest.mark.parametrize("options", [{"temperature": 0}, {"seed": 3, "top_k": 9, "top_p": 0.9}])
@pytest.mark.parametrize("name", ["fast levels", "self_mod_linear", "linear", "momentum"])
def test_the_host_waits_for_no_token(name: str, options: dict[str, Any]) -> None:
    """What it waits for, once per prompt, does not become more with the number of tokens."""
    model, counts = make(name), []
    for new in (2, 11):
        with Operations() as operations:
            model.generate(torch.zeros(2, 3, dtype=torch.int64), new, **options)
        counts.append([operations.seen.count(wait) for wait in WAITS])
    assert counts[0] == counts[1] and sum(counts[0]) == 1


def test_a_decoder_is_kept_until_parameters_move(captured: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("titans")
    on_graphs(monkeypatch, True)
    prompt = torch.zeros(1, 3, dtype=torch.int64)

    def used(tokens: Tensor) -> decode.Decoder:
        model.generate(tokens, 9, temperature=0)
        return decode._decoders[model][1]

    first = used(prompt)
    with torch.no_grad():
        model.embedding.weight.mul_(-1)  # in place: graphs read the new values
    on_graphs(monkeypatch, False)
    expected = model.generate(prompt, 9, temperature=0)
    on_graphs(monkeypatch, True)
    assert torch.equal(model.generate(prompt, 9, temperature=0), expected)
    assert used(prompt) is first
    assert used(prompt.repeat(2, 1)) is not first
    second = used(prompt)
    model.embedding.weight.data = model.embedding.weight.data.clone()
    assert used(prompt) is not second


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("self_mod", 64, "cpu"), "there are none on cpu"),
        (("attention", 1, "cuda"), "the cache of attention grows with every token"),
        (("sliding_attention", 1, "cuda"), "the cache of sliding_attention grows"),
        (("titans", 1024, "cuda"), "shapes repeat after 1024 tokens only"),
        (("self_mod", 512, "cuda"), None),
    ],
)
def test_what_is_generated_without_graphs(arguments: tuple[str, int, str], reason: str | None) -> None:
    mixer, cycle, device = arguments
    found = decode.why_no_decoder(make("titans"), mixer, cycle, torch.device(device))
    assert (found is None) if reason is None else (found is not None and reason in found)


def test_sharded_parameters_have_no_place_of_their_own() -> None:
    class Sharded(torch.Tensor):
        """As those of FSDP2."""

    model = make("titans")
    model.embedding.weight = nn.Parameter(model.embedding.weight.detach().as_subclass(Sharded))
    found = decode.why_no_decoder(model, "titans", 4, torch.device("cuda"))
    assert found is not None and "sharded" in found


@pytest.mark.parametrize("failing", [1, 3])
def test_a_failed_capture_is_told_and_generation_goes_on(
    failing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tries = make("fast levels"), []

    def fails(*arguments: Any, **options: Any) -> Pretended:
        tries.append(1)
        if len(tries) >= failing:
            raise torch.OutOfMemoryError("out of memory")
        return pretend(*arguments, **options)

    monkeypatch.setattr(decode, "capture", fails)
    prompt = torch.randint(17, (2, 5))
    on_graphs(monkeypatch, False)
    expected = model.generate(prompt, 40, seed=1)
    on_graphs(monkeypatch, True)
    with pytest.warns(RuntimeWarning, match="no CUDA graphs from here on: out of memory") as told:
        for _ in range(2):
            assert torch.equal(model.generate(prompt, 40, seed=1), expected)
    assert len(tries) == failing and len(told) == 1


def test_all_graphs_write_into_the_same_logits(captured: None) -> None:
    model = make("titans")
    token = torch.zeros(2, 1, dtype=torch.int64)
    decoder = Decoder(model, 4)
    with torch.no_grad():
        decoder.start(model(token)[1], token)
        for _ in range(9):
            decoder(token)
        assert {step.run().data_ptr() for step in decoder.steps.values()} == {decoder.logits.data_ptr()}  # type: ignore[attr-defined]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_captured_steps_on_a_card() -> None:
    model = make("fast levels").cuda()
    prompt = torch.randint(17, (2, 5), device="cuda")
    found = model.generate(prompt, 40, temperature=0)
    for place in range(5, 45):
        logits, _ = model(found[:, :place])
        best = logits[:, -1].max(-1).values
        chosen = logits[:, -1].gather(1, found[:, place : place + 1]).squeeze(1)
        assert bool((best - chosen < 1e-4).all())
