"""Numbers of documents that come back: one meaning in every layer, and no state to go on from."""

from __future__ import annotations

import re

import pytest
import torch
from small_models import hope
from torch import Tensor

from nested_learning.layers.attention import Attention
from nested_learning.layers.cms import CMS
from nested_learning.layers.config import MemoryConfig
from nested_learning.layers.documents import locate_documents
from nested_learning.layers.mixer import MIXERS
from nested_learning.levels import LevelSpec
from nested_learning.models.block import HopeBlock
from nested_learning.models.config import HopeConfig
from nested_learning.models.lm import HopeLM

BLOCK = 4
LEVELS = (LevelSpec(name="fast", chunk_size=BLOCK), LevelSpec(name="plain"))
LIVELY = MemoryConfig(eta_max=1.0, eta_bias=0.0, alpha_bias=1.0)


def config(mixer: str) -> HopeConfig:
    return hope(
        vocab_size=29, dim=8, num_layers=2, num_heads=2, mixer=mixer, levels=LEVELS, chunk_size=BLOCK,
        window=5, memory=LIVELY,
    )  # fmt: skip


def make(mixer: str) -> HopeLM:
    torch.manual_seed(0)
    return HopeLM(config(mixer)).double()


def tokens(length: int = 12) -> Tensor:
    return torch.randint(29, (1, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_number_that_comes_back_begins_another_document(mixer: str) -> None:
    model, text = make(mixer), tokens()
    again = torch.tensor([[0] * 4 + [1] * 4 + [0] * 4])
    found, _ = model(text, documents=again)
    alone = torch.cat([model(part)[0] for part in text.split(4, 1)], 1)
    torch.testing.assert_close(found, alone, rtol=1e-10, atol=1e-10)
    assert (found - model(text)[0])[:, 8:].abs().max() > 1e-4  # documents that saw one another would differ


@pytest.mark.parametrize("mixer", MIXERS)
def test_any_numbers_of_the_same_runs_mean_the_same(mixer: str) -> None:
    model, text = make(mixer), tokens()
    runs = torch.tensor([[0] * 4 + [1] * 4 + [2] * 4])
    expected, _ = model(text, documents=runs)
    for first, second, third in ((7, -100, 7), (-1, 3, -1), (2, 1, 0)):
        numbers = torch.tensor([[first] * 4 + [second] * 4 + [third] * 4])
        for dtype in (torch.int64, torch.int32, torch.int8):
            assert torch.equal(model(text, documents=numbers.to(dtype))[0], expected)


@pytest.mark.parametrize("window", [None, 3])
def test_attention_alone_has_the_same_meaning(window: int | None) -> None:
    torch.manual_seed(0)
    layer, x = Attention(8, 2, window=window).double(), torch.randn(1, 9, 8, dtype=torch.float64)
    documents = locate_documents(torch.tensor([[5, 5, 5, 1, 1, 5, 5, 5, 5]]), 1)
    alone = torch.cat([layer(part)[0] for part in x.split([3, 2, 4], 1)], 1)
    torch.testing.assert_close(layer(x, documents=documents)[0], alone, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_state_of_several_documents_is_not_continued(mixer: str) -> None:
    model, text = make(mixer), tokens()
    _, state = model(text, documents=torch.zeros_like(text))
    with pytest.raises(ValueError, match="state belongs to rows of several documents, which cannot be"):
        model(text, state)
    _, state = model(text)
    assert model(text, state)[1].position == 24


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        (torch.zeros(1, 12), "documents must be integers [batch, length], got float32 [1, 12]"),
        (torch.zeros(1, 12, dtype=torch.bool), "must be integers [batch, length], got bool [1, 12]"),
        (torch.zeros(12, dtype=torch.int64), "must be integers [batch, length], got int64 [12]"),
        ([[0] * 12], "documents must be integers [batch, length], got list"),
        (torch.zeros(1, 11, dtype=torch.int64), "of tokens, (1, 12), and go without a state; got (1, 11)"),
        (torch.zeros(2, 12, dtype=torch.int64), "of tokens, (1, 12), and go without a state; got (2, 12)"),
    ],
)
def test_documents_of_another_kind_are_refused(documents: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make("self_mod")(tokens(), documents=documents)


@pytest.mark.parametrize("name", ["Attention", "CMS", "HopeBlock"])
def test_layers_alone_refuse_documents_that_do_not_fit(name: str) -> None:
    layer = {
        "Attention": lambda: Attention(8, 2),
        "CMS": lambda: CMS(8, LEVELS),
        "HopeBlock": lambda: HopeBlock(config("self_mod")),
    }[name]()
    x, numbers = torch.randn(1, 12, 8), torch.zeros(1, 12, dtype=torch.int64)
    _, state = layer(x)
    documents = locate_documents(numbers, BLOCK)
    for call, message in (
        (lambda: layer(x, None, numbers), "documents made by locate_documents, got int64 [1, 12]"),
        (lambda: layer(x[:, :11], None, documents), "must be [batch, length] of x, [1, 11], got [1, 12]"),
        (lambda: layer(x, state, documents), "takes documents or a state, not both"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            call()
