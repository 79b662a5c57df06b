"""Tokenizers: raw bytes, or SentencePiece with byte fallback. Decoding returns the encoded text unchanged."""

from __future__ import annotations

import hashlib
import io
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from nested_learning.aliases import our_path
from nested_learning.checks import near_path
from nested_learning.data.config import TokenizerConfig

MODEL_TYPES = ("bpe", "unigram")
DEFAULT_VOCAB_SIZE = 4096
SEGMENT_CHARS = 1 << 14
WHOLE_CHARS = 1 << 20


class Tokenizer(Protocol):
    """The interface of a tokenizer. `eos_id` ends every document."""

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""
        ...

    @property
    def eos_id(self) -> int:
        """The token at the end of a document."""
        ...

    @property
    def fingerprint(self) -> str:
        """Short string that is equal for two tokenizers exactly if they encode alike."""
        ...

    @property
    def unknown_ids(self) -> frozenset[int]:
        """Ids that stand for text outside the vocabulary, which is lost."""
        ...

    @property
    def byte_ids(self) -> frozenset[int]:
        """Ids of single bytes."""
        ...

    @property
    def segment_chars(self) -> int:
        """Longer texts may be encoded in segments (see `text_segments`) of at most this many characters."""
        ...

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without a final `eos_id`.

        Raises:
            ValueError: the text holds half of a surrogate pair.
        """
        ...

    def decode(self, ids: list[int]) -> str:
        """Text of `ids`; `eos_id` decodes to nothing."""
        ...

    def state(self) -> dict[str, Any]:
        """Strings and bytes from which `load_tokenizer` rebuilds this tokenizer; for checkpoints."""
        ...


class ByteTokenizer:
    """One token per UTF-8 byte, ids 0-255, and 256 for the end of a document."""

    vocab_size = 257
    eos_id = 256
    fingerprint = "byte"
    segment_chars = WHOLE_CHARS
    unknown_ids: frozenset[int] = frozenset()
    byte_ids = frozenset(range(256))

    def encode(self, text: str) -> list[int]:
        """The UTF-8 bytes of `text`.

        Raises:
            ValueError: the text holds half of a surrogate pair.
        """
        return list(_valid(text).encode("utf-8"))

    def decode(self, ids: list[int]) -> str:
        """Text of `ids`; bytes that are not UTF-8, which a sampled sequence may hold, become U+FFFD.

        Raises:
            ValueError: an id is not from 0 to 256.
        """
        for token in ids:
            if not 0 <= token < self.vocab_size:
                raise ValueError(f"token id {token} is outside the byte vocabulary, 0 to 256")
        return bytes(token for token in ids if token != self.eos_id).decode("utf-8", errors="replace")

    def state(self) -> dict[str, Any]:
        """`{"kind": "byte"}`."""
        return {"kind": "byte"}


class SentencePieceTokenizer:
    """A SentencePiece model, stored as bytes so that a checkpoint can contain it.

    With a model from `train_sentencepiece`, `decode(encode(x)) == x` for every text, newlines and runs of
    spaces included, with one exception: U+2581, SentencePiece's own sign for a space, becomes a space.

    Args:
        model: the serialised model.

    Raises:
        ValueError: it is not a model, or has no end token.
    """

    def __init__(self, model: bytes) -> None:
        import sentencepiece

        processor = sentencepiece.SentencePieceProcessor()
        try:
            processor.LoadFromSerializedProto(model)
        except RuntimeError as error:
            raise ValueError(f"model: {len(model)} bytes that are not a SentencePiece model") from error
        if processor.eos_id() < 0:
            raise ValueError("model: this SentencePiece model has no end-of-sentence piece (eos_id is -1)")
        self._processor: Any = processor
        self._model = model
        self.vocab_size = int(processor.vocab_size())
        self.eos_id = int(processor.eos_id())
        self.fingerprint = "sentencepiece-" + hashlib.sha256(model).hexdigest()[:16]
        ids = range(self.vocab_size)
        self.unknown_ids = frozenset(i for i in ids if processor.is_unknown(i))
        self.byte_ids = frozenset(i for i in ids if processor.is_byte(i))
        self.segment_chars = SEGMENT_CHARS if self._cuts_exactly() else WHOLE_CHARS

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`. Control pieces such as `</s>` that occur in the text are plain text.

        Raises:
            ValueError: the text holds half of a surrogate pair.
        """
        ids: list[int] = self._processor.encode(_valid(text))
        return ids

    def decode(self, ids: list[int]) -> str:
        """Text of `ids`.

        Raises:
            ValueError: an id is outside the vocabulary.
        """
        for token in ids:
            if not 0 <= token < self.vocab_size:
                raise ValueError(f"token id {token} is outside the vocabulary, 0 to {self.vocab_size - 1}")
        text: str = self._processor.decode(ids)
        return text

    def _cuts_exactly(self) -> bool:
        """Whether segments encode alone as they do inside a text; models that prepend a space do not."""
        parts = ["one two\n", "three  four\n", "  five", " six\n"]
        return self.encode("".join(parts)) == [token for part in parts for token in self.encode(part)]

    def state(self) -> dict[str, Any]:
        """`{"kind": "sentencepiece", "model": bytes}`."""
        return {"kind": "sentencepiece", "model": self._model}


def train_tokenizer(config: TokenizerConfig, texts: Iterable[str]) -> Tokenizer:
    """The tokenizer that `config` asks for: trained on `texts`, unless there is nothing to train.

    Raises:
        ValueError: see `train_sentencepiece`.
        FileNotFoundError: there is no file `config.path`.
    """
    if config.path is not None:
        return load_tokenizer(config.path)
    if config.kind == "byte":
        return ByteTokenizer()
    return train_sentencepiece(texts, config.vocab_size, config.kind)


def train_sentencepiece(
    texts: Iterable[str], vocab_size: int = DEFAULT_VOCAB_SIZE, model_type: str = "bpe"
) -> SentencePieceTokenizer:
    """Train a lossless SentencePiece model. The same texts give the same model, bit for bit.

    Args:
        texts: whole documents or lines. Newlines end a training sentence and are encoded as a byte.
        vocab_size: number of pieces: `<unk>`, `</s>`, 256 bytes, and the learned ones.
        model_type: "bpe" or "unigram" (Kudo & Richardson, 2018).

    Raises:
        ValueError: an unknown type, no text, or a vocabulary too large or too small for the text.
    """
    import sentencepiece

    if model_type not in MODEL_TYPES:
        raise ValueError(f"model_type={model_type!r} is unknown; allowed: bpe, unigram")
    lines = _training_lines(texts)
    if (first := next(lines, None)) is None:
        raise ValueError("texts: no text to train a tokenizer on")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=itertools.chain([first], lines),
            model_writer=model,
            vocab_size=vocab_size,
            model_type=model_type,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            unk_id=0,
            eos_id=1,
            bos_id=-1,
            pad_id=-1,
            num_threads=1,  # the sums of unigram training depend on the number of threads
            max_sentence_length=1 << 30,  # longer lines would be dropped silently
            minloglevel=3,
        )
    except RuntimeError as error:
        raise _training_error(vocab_size, str(error)) from error
    return SentencePieceTokenizer(model.getvalue())


def text_segments(text: str, limit: int) -> Iterator[str]:
    """Split `text` into segments of at most `limit` characters: encoding them takes less time and memory.

    Segments end after a newline if possible, otherwise before a space, otherwise anywhere. Tokens of a model
    from `train_sentencepiece` never span a newline or two words, so only a run of more than `limit`
    characters without white space is encoded differently than in the whole text.
    """
    start = 0
    while len(text) - start > limit:
        cut = text.rfind("\n", start, start + limit) + 1
        if not cut:
            cut = text.rfind(" ", start + 1, start + limit)
            while cut > start and text[cut - 1] == " ":  # not inside a run of spaces
                cut -= 1
        cut = cut if cut > start else start + limit
        yield text[start:cut]
        start = cut
    yield text[start:]


def token_dtype(vocab_size: int) -> np.dtype[np.unsignedinteger[Any]]:
    """Little-endian uint16 if every id fits, else uint32."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def encode_document(tokenizer: Tokenizer, text: str) -> npt.NDArray[np.unsignedinteger[Any]]:
    """Token ids of a document and its `eos_id`, `[N]` of `token_dtype`; memory is proportional to N."""
    dtype = token_dtype(tokenizer.vocab_size)
    if isinstance(tokenizer, ByteTokenizer):
        data = np.frombuffer(_valid(text).encode("utf-8"), np.uint8)
        return np.append(data.astype(dtype), np.asarray([tokenizer.eos_id], dtype=dtype))
    pieces = [
        np.asarray(tokenizer.encode(segment), dtype=dtype)
        for segment in text_segments(text, tokenizer.segment_chars)
    ]
    return np.concatenate([*pieces, np.asarray([tokenizer.eos_id], dtype=dtype)])


def load_tokenizer(source: Mapping[str, Any] | str | Path) -> Tokenizer:
    """Rebuild a tokenizer from `Tokenizer.state()`, or read a SentencePiece `.model` file.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: an unknown state, or a model that cannot be read.
    """
    if isinstance(source, Mapping):
        kind = source.get("kind")
        if kind == "byte":
            return ByteTokenizer()
        if kind == "sentencepiece":
            return SentencePieceTokenizer(bytes(source["model"]))
        raise ValueError(f"tokenizer state has kind={kind!r}; allowed: byte, sentencepiece")
    path = Path(our_path(source))
    if not path.is_file():
        raise FileNotFoundError(f"tokenizer file {path} does not exist{near_path(path)}")
    try:
        return SentencePieceTokenizer(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"tokenizer file {path}: {error}") from error


def _training_lines(texts: Iterable[str]) -> Iterator[str]:
    """Lines without their end. An iterator, since a list of short lines takes many times the memory."""
    # Only "\n" is cut at: str.splitlines() would also cut at characters that must stay inside a piece.
    lines = (line for text in texts for line in io.StringIO(_valid(text), newline="\n"))
    return (line.removesuffix("\n") for line in lines if line.strip())


def _valid(text: str) -> str:
    """`text` itself.

    Raises:
        ValueError: it holds half of a surrogate pair, which UTF-8 cannot encode.
    """
    try:
        if not text.isascii():
            text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"text holds half of a surrogate pair, U+{ord(text[error.start]):04X}, at position {error.start}"
        ) from None
    return text


def _training_error(vocab_size: int, message: str) -> ValueError:
    """SentencePiece's message about the vocabulary size as one sentence."""
    if most := re.search(r"too high.*<= (\d+)", message):
        return ValueError(
            f"vocab_size={vocab_size} is more than this text supports: at most {most[1]}, or use more text"
        )
    if least := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return ValueError(
            f"vocab_size={vocab_size} is too small for this text: at least {least[1]} "
            "(256 bytes, two special pieces and its characters)"
        )
    return ValueError(f"SentencePiece could not train with vocab_size={vocab_size}: {message}")
