"""A conversation equals reading everything that was said, in one model call."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from small_models import hope
from torch.nn import functional as F

from nested_learning.adapt import AdaptConfig, memorize
from nested_learning.chat import Chat
from nested_learning.data.tokenizer import ByteTokenizer
from nested_learning.levels import LevelSpec
from nested_learning.models.lm import HopeLM
from nested_learning.models.sampling import Sampler
from nested_learning.state import ModelState

BYTES = ByteTokenizer()
PIECE = 61
FAST = (LevelSpec(name="fast", chunk_size=4), LevelSpec())


def make(mixer: str = "self_mod") -> HopeLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 257, "dim": 8, "num_layers": 2, "num_heads": 2, "chunk_size": 4}
    return HopeLM(hope(mixer, FAST, **sizes)).double().eval()


def chat(model: HopeLM, learn: AdaptConfig | None = None) -> Chat:
    return Chat(model, BYTES, Sampler(max_new_tokens=7, temperature=0), learn=learn)


def losses_of(model: HopeLM, text: list[int]) -> torch.Tensor:
    """Losses of all tokens but the first, in one call."""
    with torch.no_grad():
        logits = model(torch.tensor([text[:-1]]))[0][0]
    return F.cross_entropy(logits, torch.tensor(text[1:]), reduction="none")


def assert_equal_states(a: ModelState, b: ModelState) -> None:
    assert a.position == b.position
    for name, tensor in a.named_tensors().items():
        torch.testing.assert_close(tensor, b.named_tensors()[name], rtol=0, atol=1e-9)


def test_everything_said_is_read() -> None:
    model = make()
    talk = chat(model)
    tokens: list[int] = []
    for text in ("Hello", " and then", "\nyes"):
        tokens += BYTES.encode(text)
        expected = model.generate([tokens], 7, temperature=0)[0]
        shown = "".join(talk.say(text))
        assert BYTES.decode(tokens) + shown == BYTES.decode(expected)
        tokens = expected
    with torch.no_grad():
        assert_equal_states(talk.state, model(torch.tensor([tokens]))[1])


def test_an_answer_that_is_cut_short_is_read_as_far_as_it_came() -> None:
    model = make("linear")
    talk = Chat(model, BYTES, Sampler(max_new_tokens=40, seed=1))
    answer = talk.say("Hello")
    first = [next(answer), next(answer)]
    answer.close()  # type: ignore[attr-defined]
    whole = model.generate([BYTES.encode("Hello")], 40, seed=1)[0]
    read = whole[: talk.state.position]
    assert BYTES.decode(read) == "Hello" + "".join(first) and len(read) < len(whole)
    with torch.no_grad():
        assert_equal_states(talk.state, model(torch.tensor([read]))[1])


def test_remembering_and_surprise_are_losses_given_what_was_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nested_learning.chat.PIECE", PIECE)
    model = make()
    talk = chat(model)
    text = "All happy families are alike. " * 3
    found = list(talk.remember(text))
    tokens = BYTES.encode(text)
    assert [now.read for now in found] == [PIECE, len(tokens), len(tokens)] and len(tokens) > PIECE
    assert found[-1].first == pytest.approx(float(losses_of(model, tokens).mean()), abs=1e-9)
    again = losses_of(model, tokens + tokens)[len(tokens) :]
    assert found[-1].again == pytest.approx(float(again.mean()), abs=1e-9)
    assert found[0].again is None
    with torch.no_grad():
        assert_equal_states(talk.state, model(torch.tensor([tokens]))[1])
    before = talk.state
    words, losses = zip(*talk.surprise("unhappy"), strict=True)
    assert "".join(words) == "nhappy" and talk.state is before
    expected = losses_of(model, tokens + BYTES.encode("unhappy"))[len(tokens) :]
    torch.testing.assert_close(torch.tensor(losses, dtype=torch.float64), expected, rtol=0, atol=1e-9)


def test_learning_from_what_is_read() -> None:
    """The state of `memorize`, with the last token read."""
    model, config = make(), AdaptConfig(paths="all", lr=0.1, chunk_size=8)
    talk = chat(model, config)
    tokens = BYTES.encode("All happy families")
    found = list(talk.remember(BYTES.decode(tokens)))
    report, state = memorize(model, torch.tensor([tokens]), config=config)
    with torch.no_grad():
        _, state = model(torch.tensor([tokens[-1:]]), state)
    assert bool(report.wrote.any())
    assert_equal_states(talk.state, state)
    assert found[-1].first == pytest.approx(float(report.losses.mean()), abs=1e-9)
    shown = "".join(talk.say("Go"))
    assert shown and talk.state.position == len(tokens) + 2 + 7


def test_a_character_of_several_tokens_is_read_as_it_is() -> None:
    """The last token of a text, which the answer begins with, may be half of a character. With a rate of 0
    nothing is learned: the state is that of reading."""
    model = make()
    talk = chat(model, AdaptConfig(paths="titan", lr=0.0, chunk_size=4))
    tokens = model.generate([BYTES.encode("Grüß é")], 7, temperature=0)[0]
    shown = "".join(talk.say("Grüß é"))
    assert "Grüß é" + shown == BYTES.decode(tokens)
    with torch.no_grad():
        assert_equal_states(talk.state, model(torch.tensor([tokens]))[1])


def test_memories_are_saved_compared_and_forgotten(tmp_path: Path) -> None:
    talk = chat(make("titans"))
    assert {far for of in talk.moved().values() for far in of.values()} == {0}
    list(talk.remember("It was the best of times."))
    talk.save(tmp_path / "a.pt")
    kept, far = talk.state, talk.moved()
    assert min(far["titan"].values()) > 0
    list(talk.say(" It was"))
    assert min(talk.moved(tmp_path / "a.pt")["titan"].values()) > 0
    talk.load(tmp_path / "a.pt")
    assert talk.moved() == far
    assert_equal_states(talk.state, kept)
    talk.forget()
    assert talk.state.position == 0 and talk.moved()["titan"] == dict.fromkeys(far["titan"], 0)
    chat(make("linear")).save(tmp_path / "b.pt")
    with pytest.raises(ValueError, match="state"):
        talk.load(tmp_path / "b.pt")
    assert talk.state.position == 0


def test_answers_have_seeds_of_their_own() -> None:
    model = make("linear")
    talk = Chat(model, BYTES, Sampler(max_new_tokens=9, seed=4))
    tokens: list[int] = []
    for number in range(3):
        tokens += BYTES.encode("a")
        expected = model.generate([tokens], 9, seed=4 + number, eos=[256])[0]
        assert "".join(talk.say("a")) == BYTES.decode(expected)[len(BYTES.decode(tokens)) :]
        tokens = expected
    assert all(a != b for a, b in pairwise(tokens[:3]))


def test_what_cannot_be_read_is_refused() -> None:
    talk = chat(make("linear"))
    with pytest.raises(ValueError, match="there is no text to read"):
        list(talk.say(""))
    with pytest.raises(ValueError, match="one token"):
        talk.surprise("a")
