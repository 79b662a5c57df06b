"""Rows of any length: each as if alone. Texts: stop strings, the end of a text, pieces that add up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_models import hope
from test_decode import on_graphs, pretend
from torch import Tensor

from nested_learning.data.tokenizer import ByteTokenizer, Tokenizer, train_sentencepiece
from nested_learning.layers.mixer import MIXERS
from nested_learning.levels import LevelSpec
from nested_learning.models import decode
from nested_learning.models.generation import Rows
from nested_learning.models.lm import HopeLM
from nested_learning.models.sampling import Sampler
from nested_learning.models.text import Continuation, Detokenizer, StopStrings

FAST = (LevelSpec(name="fast", chunk_size=4), LevelSpec())
NESTED = (LevelSpec(name="faster", chunk_size=2), LevelSpec(name="fast", chunk_size=4))
LENGTHS = [5, 1, 17, 5, 9]


def make(mixer: str, **changes: Any) -> HopeLM:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 19, "dim": 8, "num_layers": 2, "num_heads": 2, "chunk_size": 4}
    return HopeLM(hope(**{**sizes, "mixer": mixer, **changes})).double()


def prompts(lengths: list[int] = LENGTHS, size: int = 19) -> list[list[int]]:
    numbers = torch.Generator().manual_seed(1)
    return [torch.randint(size, (length,), generator=numbers).tolist() for length in lengths]


def alone(model: HopeLM, prompt: list[int], count: int) -> tuple[list[int], Tensor]:
    """The likeliest continuation, reading the whole text again for every token, and logits `[count, V]`."""
    text, seen = list(prompt), []
    for _ in range(count):
        with torch.no_grad():
            seen.append(model(torch.tensor([text]))[0][0, -1])
        text.append(int(seen[-1].argmax()))
    return text, torch.stack(seen)


def drawn_from(rows: Rows) -> dict[int, list[Tensor]]:
    """The logits from which each row was drawn."""
    seen: dict[int, list[Tensor]] = {row: [] for row in range(len(rows.lengths))}
    inner = rows._draw

    def look(logits: Tensor, batch: list[int], drawing: list[int]) -> Any:
        for n in drawing:
            seen[batch[n]].append(logits[n, -1].clone())
        return inner(logits, batch, drawing)

    rows._draw = look  # type: ignore[method-assign]
    for _ in rows.draws():
        pass
    return seen


@pytest.mark.parametrize(
    "model",
    [
        *(pytest.param(lambda mixer=mixer: make(mixer), id=mixer) for mixer in MIXERS),
        *(pytest.param(lambda m=m: make(m, levels=FAST), id=f"{m}-fast") for m in ("titans", "attention")),
        pytest.param(lambda: make("self_mod", levels=NESTED, cms_variant="nested"), id="nested"),
    ],
)
def test_a_ragged_batch_equals_each_prompt_alone(model: Callable[[], HopeLM]) -> None:
    lm, given = model(), prompts()
    sampler = Sampler(max_new_tokens=11, temperature=0)
    seen = drawn_from(lm.rows_of(given, sampler))
    found = lm.generate(given, 11, temperature=0)
    for row, prompt in enumerate(given):
        text, logits = alone(lm, prompt, 11)
        assert found[row] == text
        torch.testing.assert_close(torch.stack(seen[row]), logits, rtol=0, atol=1e-9)


@pytest.mark.parametrize("mixer", ["self_mod", "attention"])
def test_sampled_rows_do_not_depend_on_each_other(mixer: str) -> None:
    lm, given = make(mixer), prompts()
    options: dict[str, Any] = {"top_k": 7, "temperature": 0.8}
    found = lm.generate(given, 9, seed=5, **options)
    for row, prompt in enumerate(given):
        assert found[row] == lm.generate([prompt], 9, seed=5 + row, **options)[0]
    assert found[0] != lm.generate([given[0]], 9, seed=6, **options)[0]


def test_prompts_are_read_in_parts_where_no_row_draws() -> None:
    """3 tokens of both, 4 single ones (the last token of the short row is not read), 33 of the long row."""
    lm, calls = make("self_mod"), []
    lm.register_forward_pre_hook(lambda module, arguments: calls.append(tuple(arguments[0].shape)))
    lm.generate(prompts([3, 40]), 5, temperature=0)
    assert calls == [(2, 3), *[(2, 1)] * 4, (1, 33), *[(1, 1)] * 4]


def test_a_row_ends_at_an_end_token() -> None:
    lm, given = make("linear"), prompts()
    whole = lm.generate(given, 12, temperature=0)
    eos = {whole[0][7], whole[2][20]}

    def cut(text: list[int], start: int) -> list[int]:
        places = [place for place in range(start, len(text)) if text[place] in eos]
        return text[: places[0] + 1] if places else text

    found = lm.generate(given, 12, temperature=0, eos=eos)
    assert found == [cut(text, length) for text, length in zip(whole, LENGTHS, strict=True)]
    square = torch.tensor([given[0], given[3]])
    ended = lm.generate(square, 12, temperature=0, eos=eos).tolist()
    for row, text in zip(ended, (found[0], found[3]), strict=True):
        assert row == text + [text[-1]] * (17 - len(text))


@pytest.mark.parametrize("mixer", ["self_mod", "sliding_attention"])
def test_generation_goes_on_from_a_state(mixer: str) -> None:
    lm, given = make(mixer), prompts([6, 6])
    before, after = torch.tensor([row[:4] for row in given]), [given[0][4:], given[1][4:5]]
    with torch.no_grad():
        _, state = lm(before)
    found = lm.generate(after, 9, temperature=0, state=state)
    assert found[0] == alone(lm, given[0], 9)[0][4:]
    assert found[1] == alone(lm, given[1][:5], 9)[0][4:]


def test_captured_steps_serve_ragged_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a longer prompt is read on from the state that the graphs have left."""
    lm = make("self_mod", levels=FAST)
    given = prompts([5, 37, 6])
    expected = lm.generate(given, 20, temperature=0)
    monkeypatch.setattr(decode, "capture", pretend)
    on_graphs(monkeypatch, True)
    for _ in range(2):
        assert lm.generate(given, 20, temperature=0) == expected


@pytest.mark.parametrize(
    ("wrong", "kind", "message"),
    [
        ([], ValueError, "got lengths []"),
        ([[1], []], ValueError, "got lengths [1, 0]"),
        ([[1], [19]], ValueError, "tokens must be from 0 to 18, got 19 in prompt 1"),
        ([[1], [2.0]], TypeError, "tokens of prompt 1 must be integers, got 2.0"),
        ([1, 2], TypeError, "prompts must be a tensor [batch, length] or lists of tokens"),
        ("text", TypeError, "for texts see `generate_text`"),
    ],
)
def test_wrong_prompts_are_refused(wrong: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind) as error:
        make("linear").generate(wrong, 3)
    assert message in str(error.value)


# Texts


TEXT = "Ein Gruß: naïve café — 日本語, 🙂👍🏽!  Two  spaces.\n" * 3


@pytest.fixture(scope="module")
def pieces() -> Tokenizer:
    return train_sentencepiece([TEXT, "one two three four"], 300)


def tokenizers(pieces: Tokenizer) -> list[Tokenizer]:
    return [ByteTokenizer(), pieces]


def test_pieces_add_up_to_the_whole_text(pieces: Tokenizer) -> None:
    """Cut after any token, a multi-byte character included; and no piece shows half of one."""
    for tokenizer in tokenizers(pieces):
        ids = tokenizer.encode(TEXT)
        for start in range(0, 40):
            words = Detokenizer(tokenizer, ids[:start])
            shown = [words.add(token) for token in ids[start:]] + [words.rest()]
            if "\ufffd" not in tokenizer.decode(ids[:start]):
                assert tokenizer.decode(ids[:start]) + "".join(shown) == TEXT
                assert not any("\ufffd" in piece for piece in shown)


@pytest.mark.parametrize("seed", range(30))
def test_random_tokens_add_up_too(seed: int, pieces: Tokenizer) -> None:
    """Bytes that are no UTF-8 among them."""
    for tokenizer in tokenizers(pieces):
        numbers = torch.Generator().manual_seed(seed)
        ids = torch.randint(2, min(tokenizer.vocab_size, 290), (40,), generator=numbers).tolist()
        before = tokenizer.encode("So: ")
        words = Detokenizer(tokenizer, before)
        shown = "".join([words.add(token) for token in ids] + [words.rest()])
        assert "So: " + shown == tokenizer.decode(before + ids)


@pytest.mark.parametrize("stops", [["END"], ["\n\n", "\n"], ["aab", "b"], ["xyz", "aaa"], ["END", "E"]])
@pytest.mark.parametrize("text", ["wordENDmore", "a\nb\n\nc", "aaaab", "aaxy", "EEND", "no stop here EN"])
def test_stop_strings_cut_where_a_search_in_the_whole_text_does(text: str, stops: list[str]) -> None:
    places = [text.find(stop) for stop in stops if stop in text]
    for size in range(1, 6):
        stop = StopStrings(stops)
        shown = ""
        for start in range(0, len(text), size):
            if not stop.found:
                shown += stop.add(text[start : start + size])
        shown += stop.rest()
        if size == 1 and places:  # one by one, what ends first is found first
            ends = min(text.find(one) + len(one) for one in stops if one in text)
            first = [one for one in stops if one in text[:ends]]
            assert shown == text[: min(text[:ends].find(one) for one in first)]
        elif not places:
            assert shown == text and not stop.found
        else:
            assert stop.found and not any(one in shown for one in stops)


def test_what_may_become_a_stop_string_waits() -> None:
    stop = StopStrings(["END"])
    assert [stop.add(piece) for piece in ("aE", "N", "x", "EN")] == ["a", "", "ENx", ""]
    assert stop.rest() == "EN"


@pytest.mark.parametrize("wrong", ["END", [""], ["a", 3]])
def test_wrong_stop_strings_are_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match="stop must be a list of strings that are not empty"):
        StopStrings(wrong)


def byte_model(mixer: str = "self_mod") -> HopeLM:
    return make(mixer, vocab_size=257)


@pytest.mark.parametrize("mixer", ["self_mod", "titans", "attention"])
def test_a_stream_equals_the_whole_decode(mixer: str, pieces: Tokenizer) -> None:
    for tokenizer in tokenizers(pieces):
        lm = make(mixer, vocab_size=tokenizer.vocab_size)
        for prompt in ("Grüße", "", "日"):
            ids = tokenizer.encode(prompt) or [tokenizer.eos_id]
            for seed in range(3):
                stream = lm.stream(prompt, tokenizer, max_new_tokens=25, seed=seed)
                assert stream.end is None
                shown = "".join(stream)
                (whole,) = lm.generate([ids], 25, seed=seed, eos={tokenizer.eos_id})
                assert prompt + shown == tokenizer.decode(whole)
                assert stream.text == shown and stream.tokens == whole
                assert stream.end == ("eos" if whole[-1] == tokenizer.eos_id else "length")
                assert lm.generate_text([prompt], tokenizer, max_new_tokens=25, seed=seed) == [shown]


def test_texts_of_a_batch_stop_on_their_own() -> None:
    lm, tokenizer = byte_model("linear"), ByteTokenizer()
    given = ["ab", "a longer prompt than that", "c"]
    whole = lm.generate_text(given, tokenizer, max_new_tokens=30, seed=2)
    stop = whole[1][4:6]
    found = lm.generate_text(given, tokenizer, max_new_tokens=30, seed=2, stop=[stop])
    assert found == [text.split(stop)[0] for text in whole]
    for row, prompt in enumerate(given):
        stream = lm.stream(prompt, tokenizer, max_new_tokens=30, seed=2 + row, stop=[stop])
        assert "".join(stream) == found[row]
        assert (stream.end == "stop") == (stop in whole[row])


def test_the_state_of_a_stream_has_read_all_of_it() -> None:
    lm, tokenizer = byte_model(), ByteTokenizer()
    stream = lm.stream("Once", tokenizer, max_new_tokens=9, seed=1)
    state = stream.state()
    with torch.no_grad():
        _, expected = lm(torch.tensor([stream.tokens]))
    assert state.position == expected.position == len(stream.tokens)
    for name, tensor in expected.named_tensors().items():
        torch.testing.assert_close(state.named_tensors()[name], tensor, rtol=0, atol=1e-9)
    more = lm.stream(" more", tokenizer, state=state, max_new_tokens=7, temperature=0)
    text = alone(lm, stream.tokens + tokenizer.encode(" more"), 7)[0]
    assert (
        "".join(more)
        == tokenizer.decode(text)[len(tokenizer.decode(stream.tokens + tokenizer.encode(" more"))) :]
    )


def test_an_end_token_ends_a_text() -> None:
    tokenizer = ByteTokenizer()
    text = Continuation(tokenizer, [97], (), 9)
    assert [text.add(token) for token in (98, 0xC3, tokenizer.eos_id)] == ["b", "", "\ufffd"]
    assert text.end == "eos"


def test_wrong_texts_are_refused() -> None:
    lm, tokenizer = byte_model("linear"), ByteTokenizer()
    with pytest.raises(TypeError, match="prompts must be a list of strings, got one string"):
        lm.generate_text("text", tokenizer)
    with pytest.raises(TypeError, match="a prompt must be a string, got int"):
        lm.stream(3, tokenizer)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="temperature must be at least 0"):
        lm.stream("a", tokenizer, temperature=-1)
    state = lm.stream("a", tokenizer, max_new_tokens=1).state()
    with pytest.raises(ValueError, match="goes on from a state must not be empty"):
        lm.stream("", tokenizer, state=state)
