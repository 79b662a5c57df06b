"""Generation by captured steps gives what eager steps give.

Without a card, `capture` is replaced by one that runs the function at every replay, over the same tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_models import hope
from torch import Tensor

from nested_learning.graphs import Replay
from nested_learning.layers.config import MemoryConfig
from nested_learning.levels import LevelSpec
from nested_learning.models import decode, lm
from nested_learning.models.lm import HopeLM

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
}


def pretend(run: Callable[[], Tensor], device: Any, warm_up: Any = None, pool: Any = None) -> Replay:
    """`capture`, with a function that is run again and writes to the same result."""
    kept = run().clone()  # a real capture warms up by running it
    return Replay(kept, lambda: kept.copy_(run()), pool or object())


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
    for length in (11, 6):
        for options in ({"temperature": 0}, {"seed": 3, "top_k": 9}):
            prompt, count = tokens[:, :length], 3 * model.config.alignment + 3
            on_graphs(monkeypatch, True)
            found = model.generate(prompt, count, **options)  # type: ignore[arg-type]
            on_graphs(monkeypatch, False)
            assert torch.equal(found, model.generate(prompt, count, **options))  # type: ignore[arg-type]
    _, decoder = decode._decoders[model]
    assert len(decoder.graphs) == model.config.alignment


def test_buffers_stay_where_they_are(captured: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """And weights that are not written have one buffer for all phases of a chunk."""
    model = make("fast levels")
    on_graphs(monkeypatch, True)
    prompt = torch.zeros(1, 8, dtype=torch.int64)
    model.generate(prompt, 20, temperature=0)
    _, decoder = decode._decoders[model]

    def places() -> dict[int, list[int]]:
        return {phase: [t.data_ptr() for t in state.tensors()] for phase, state in decoder.states.items()}

    before = places()
    model.generate(prompt[:, :5], 300, temperature=0)
    assert places() == before and len(before) == 8
    weights = {
        state.named_tensors()["layers.0.mixer.banks.0.w2"].data_ptr() for state in decoder.states.values()
    }
    assert len(weights) == 2  # a cycle of 8 tokens has two chunks


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
    found = decode.why_no_decoder(mixer, cycle, torch.device(device))
    assert (found is None) if reason is None else (found is not None and reason in found)


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
