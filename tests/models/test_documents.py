"""Rows of several documents give what rows of one document each give: answers and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_models import hope
from tolerances import assert_same
from torch import Tensor

from nested_learning.layers.config import MemoryConfig
from nested_learning.layers.documents import locate_documents
from nested_learning.layers.mixer import MIXERS
from nested_learning.levels import LevelSpec
from nested_learning.models.config import HopeConfig
from nested_learning.models.lm import HopeLM

VOCAB = 29
LENGTH = 2 * 46 * 16  # operations in a row: layers, tokens that a memory passes, width
PLAIN = LevelSpec(name="plain")
LEVELS = {
    "plain": (PLAIN,),
    "fast": (LevelSpec(name="fast", chunk_size=4), PLAIN),
    "projected": (LevelSpec(name="fast", chunk_size=8, key="projected", target="same"), PLAIN),
    "two": (
        LevelSpec(name="quick", chunk_size=4),
        LevelSpec(name="steady", chunk_size=8, momentum=True),
        PLAIN,
    ),
}
LIVELY: dict[str, Any] = {"eta_max": 1.0, "eta_bias": 0.0, "alpha_bias": 1.0}


def make(mixer: str, levels: str = "fast", memory: dict[str, Any] | None = None, **options: Any) -> HopeLM:
    torch.manual_seed(0)
    config = hope(
        vocab_size=VOCAB, dim=16, num_layers=2, num_heads=2, mixer=mixer, levels=LEVELS[levels], chunk_size=4,
        window=5, memory=MemoryConfig(**LIVELY, **(memory or {})), **options,
    )  # fmt: skip
    return HopeLM(config).double()


def pack(texts: list[list[Tensor]], block: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of documents, each from a multiple of `block` on: tokens, document of each, and whether a place
    holds a token."""
    rows = []
    for row in texts:
        parts = []
        for number, text in enumerate(row):
            filled = torch.full((3, -(-len(text) // block) * block), 1)
            filled[1], filled[2] = number, 0
            filled[0, : len(text)], filled[2, : len(text)] = text, 1
            parts.append(filled)
        rows.append(torch.cat(parts, 1))
    width = max(row.shape[1] for row in rows)
    padded = torch.stack([torch.nn.functional.pad(row, (0, width - row.shape[1]), value=0) for row in rows])
    for row, length in zip(padded, [row.shape[1] for row in rows], strict=True):
        row[1, length:] = row[1, length - 1]
    return padded[:, 0], padded[:, 1], padded[:, 2].bool()


def documents_of(lengths: list[list[int]]) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [[torch.randint(VOCAB, (n,), generator=generator) for n in row] for row in lengths]


CASES: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = [
    *[(mixer, "fast", {}, {}) for mixer in MIXERS],
    ("attention", "plain", {}, {}),
    ("sliding_attention", "plain", {}, {}),
    ("attention", "plain", {}, {"conv_window": 4}),
    ("sliding_attention", "fast", {}, {"conv_window": 3, "activation": "silu", "output_gate": True}),
    ("self_mod", "projected", {}, {}),
    ("self_mod", "two", {}, {"cms_variant": "nested"}),
    ("attention", "two", {}, {"cms_variant": "independent"}),
    ("self_mod", "plain", {"momentum": True}, {}),
    ("self_mod", "plain", {"keep_every": 2}, {}),
    ("self_mod", "plain", {"projection_chunk_size": 8, "retention_target": "init"}, {}),
    ("titans", "fast", {}, {"read": "after_write"}),
    ("self_mod_linear", "plain", {"momentum": True, "retention_target": "init"}, {"read": "before_write"}),
]


@pytest.mark.parametrize(("mixer", "levels", "memory", "options"), CASES)
def test_packed_documents_are_read_as_if_alone(
    mixer: str, levels: str, memory: dict[str, Any], options: dict[str, Any]
) -> None:
    model = make(mixer, levels, memory, **options)
    texts = documents_of([[30, 7, 4, 12], [5, 41], [9, 1, 8]])
    tokens, numbers, real = pack(texts, model.config.alignment)
    packed = model(tokens, documents=numbers)[0][real]
    alone = torch.cat([model(text[None])[0][0] for row in texts for text in row])
    assert_same(packed, alone, LENGTH)
    weight = torch.randn(packed.shape, dtype=packed.dtype, generator=torch.Generator().manual_seed(4))
    assert_same(gradients(model, packed, weight), gradients(model, alone, weight), LENGTH)


def gradients(model: HopeLM, logits: Tensor, weight: Tensor) -> list[Tensor]:
    return list(
        torch.autograd.grad((logits * weight).sum(), list(model.parameters()), materialize_grads=True)
    )


@pytest.mark.parametrize("mixer", MIXERS)
def test_without_numbers_documents_do_reach_one_another(mixer: str) -> None:
    """Otherwise the test above would say nothing."""
    model = make(mixer)
    texts = documents_of([[8, 9]])
    tokens, numbers, _ = pack(texts, model.config.alignment)
    apart, crossing = model(tokens, documents=numbers)[0], model(tokens)[0]
    assert_same(apart[0, :8], crossing[0, :8], LENGTH)
    assert (apart[0, 8:] - crossing[0, 8:]).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("mixer", "levels", "memory", "expected"),
    [
        ("attention", "plain", {}, 1),
        ("attention", "two", {}, 8),
        ("linear", "plain", {}, 4),
        ("self_mod", "projected", {"projection_chunk_size": 2}, 8),
    ],
)
def test_alignment_is_whole_chunks_of_every_memory(
    mixer: str, levels: str, memory: dict[str, Any], expected: int
) -> None:
    assert make(mixer, levels, memory).config.alignment == expected


def test_a_slow_level_does_not_align() -> None:
    config = HopeConfig(levels=(LevelSpec(name="slow", chunk_size=96), PLAIN), chunk_size=16, seq_len=32)
    assert config.alignment == 16


def test_documents_begin_with_a_block() -> None:
    numbers = torch.tensor([[0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 0, 0]])
    found = locate_documents(numbers, 4)
    assert found.begins.tolist() == [[True, True], [True, False]]
    with pytest.raises(ValueError, match="documents must begin at multiples of 4 tokens, got one at 3"):
        locate_documents(torch.tensor([[0, 0, 0, 1]]), 4)


def test_documents_go_without_a_state() -> None:
    model = make("attention")
    tokens = torch.zeros(1, 4, dtype=torch.int64)
    _, state = model(tokens)
    with pytest.raises(ValueError, match=r"shape of tokens, \(1, 4\), and go without a state; got \(1, 4\)"):
        model(tokens, state, documents=tokens)
    with pytest.raises(ValueError, match=r"got \(1, 3\)"):
        model(tokens, documents=tokens[:, :3])
