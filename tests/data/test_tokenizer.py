"""Tokenizers: exact round trips, deterministic training, state, errors."""

import functools
import io

import pytest
import torch

from nested_learning.data import (
    ByteTokenizer,
    SentencePieceTokenizer,
    TokenizerConfig,
    bundled_files,
    load_tokenizer,
    train_sentencepiece,
    train_tokenizer,
)

AWKWARD = "  two  spaces\n\n\n\ttab \r\n naïve 漢字 🐋 </s> <unk> <0x0A> \x00 end \n "


@functools.cache
def sample(num_chars: int) -> str:
    return "\n".join(path.read_text(encoding="utf-8")[:num_chars] for path in bundled_files())


@functools.cache
def trained(model_type: str) -> SentencePieceTokenizer:
    return train_sentencepiece([sample(20_000)], 512, model_type)


@pytest.mark.parametrize("path", bundled_files(), ids=lambda path: path.name)
def test_bundled_text_comes_back_exactly(path):
    text = path.read_bytes().decode("utf-8")
    tokenizer = trained("bpe")
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert len(ids) < 0.7 * len(text)  # it does compress: not a byte per token
    assert ByteTokenizer().decode(ByteTokenizer().encode(text)) == text


@pytest.mark.parametrize("text", [AWKWARD, "", " ", "\n", "   \n"])
@pytest.mark.parametrize("make", [ByteTokenizer, lambda: trained("bpe"), lambda: trained("unigram")])
def test_awkward_text_comes_back_exactly(make, text):
    tokenizer = make()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_id not in ids
    assert all(0 <= token < tokenizer.vocab_size for token in ids)
    assert tokenizer.decode([*ids, tokenizer.eos_id]) == text


def test_byte_ids_are_the_bytes():
    assert ByteTokenizer().encode("aé\n") == [97, 0xC3, 0xA9, 10]
    assert ByteTokenizer().decode([97, 0xC3, 256]) == "a\ufffd"


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_training_is_deterministic(model_type):
    again = train_sentencepiece([sample(20_000)], 512, model_type)
    assert again.state() == trained(model_type).state()
    assert again.fingerprint == trained(model_type).fingerprint
    assert again.vocab_size == 512


def test_fingerprint_tells_models_apart():
    other = train_sentencepiece([sample(15_000)], 512)
    prints = {other.fingerprint, trained("bpe").fingerprint, trained("unigram").fingerprint, "byte"}
    assert len(prints) == 4


def test_long_lines_take_part_in_training():
    line = "zyxwv " * 2_000  # 12,000 characters; SentencePiece drops lines above 4,192 unless told not to
    assert train_sentencepiece([line], 265).encode(" zyxwv zyxwv")[0] >= 258


def test_state_survives_a_checkpoint(tmp_path):
    tokenizer = trained("bpe")
    buffer = io.BytesIO()
    torch.save({"tokenizer": tokenizer.state(), "byte": ByteTokenizer().state()}, buffer)
    buffer.seek(0)
    stored = torch.load(buffer, weights_only=True)
    assert load_tokenizer(stored["byte"]).fingerprint == "byte"
    for copy in (load_tokenizer(stored["tokenizer"]), _through_file(tmp_path / "x.model", tokenizer)):
        assert copy.fingerprint == tokenizer.fingerprint
        assert copy.encode(AWKWARD) == tokenizer.encode(AWKWARD)


def _through_file(path, tokenizer):
    path.write_bytes(tokenizer.state()["model"])
    return load_tokenizer(path)


def test_training_prints_nothing(capfd):
    train_sentencepiece(["some words and some more words " * 20], 290)
    captured = capfd.readouterr()
    assert captured.out == "" and captured.err == ""


def test_vocabulary_the_text_does_not_fit_is_one_clear_error():
    text = ["hello world. " * 3]
    with pytest.raises(ValueError, match=r"vocab_size=5000 is more than this text supports: at most \d+"):
        train_sentencepiece(text, 5000)
    with pytest.raises(ValueError, match=r"vocab_size=200 is too small for this text: at least \d+"):
        train_sentencepiece(text, 200)


def test_a_configuration_trains_what_it_names():
    texts = [sample(20_000)]
    assert train_tokenizer(TokenizerConfig(kind="byte", vocab_size=257), texts).fingerprint == "byte"
    spec = TokenizerConfig(kind="unigram", vocab_size=512)
    assert train_tokenizer(spec, texts).fingerprint == trained("unigram").fingerprint


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (
            lambda: TokenizerConfig(kind="words"),
            "data.tokenizer.kind must be one of bpe, unigram, byte, got 'words'",
        ),
        (
            lambda: TokenizerConfig(kind="byte", vocab_size=300),
            "vocab_size must be 257 for data.tokenizer.kind = byte, got 300",
        ),
        (lambda: train_sentencepiece(["a"], 300, "char"), "model_type='char' is unknown"),
        (lambda: train_sentencepiece(["\n \n"], 300), "no text to train"),
        (lambda: load_tokenizer({"kind": "words"}), "kind='words'; allowed: byte, sentencepiece"),
        (lambda: SentencePieceTokenizer(b"nonsense"), "8 bytes that are not a SentencePiece model"),
        (lambda: ByteTokenizer().decode([257]), "token id 257 is outside"),
        (lambda: trained("bpe").decode([512]), "token id 512 is outside"),
    ],
)
def test_bad_input_is_named(act, message):
    with pytest.raises(ValueError, match=message):
        act()


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.model does not exist"):
        load_tokenizer(tmp_path / "none.model")
