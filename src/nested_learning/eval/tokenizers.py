"""Tokenizers for scoring: those of this package, and those of transformers, used as lm-eval uses them."""

from __future__ import annotations

from typing import Any, Protocol

from nested_learning.data.tokenizer import Tokenizer, encode_document

Ids = list[int]


class TextTokenizer(Protocol):
    """What scoring needs of a tokenizer.

    Args:
        eos_id: the token at the end of a text.
        prefix_id: the token before a text that has no context.
        fingerprint: a name for lm-eval's caches.
    """

    eos_id: int
    prefix_id: int
    fingerprint: str

    def encode(self, text: str) -> Ids:
        """Token ids of `text` with the special tokens that the tokenizer puts around a text."""
        ...

    def encode_plain(self, text: str) -> Ids:
        """Token ids of `text` alone."""
        ...

    def decode(self, ids: Ids) -> str:
        """Text of `ids`; special tokens are left out."""
        ...

    def decode_all(self, ids: Ids) -> str:
        """Text of `ids`; special tokens are written out."""
        ...


class PlainTokenizer:
    """A tokenizer of this package.

    Its only special token is the end of a text. It has no written form, and it also stands before a text
    without context.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.eos_id = self.prefix_id = tokenizer.eos_id
        self.fingerprint = tokenizer.fingerprint
        self.encode = self.encode_plain = tokenizer.encode
        self.decode = self.decode_all = tokenizer.decode


class HuggingFaceTokenizer:
    """A tokenizer of transformers, used as lm-eval's `hf` models use it.

    Texts get the special tokens that the tokenizer adds by itself, unless they begin with the prefix token
    written out. The prefix token is the beginning-of-text token, or else the end-of-text token.

    Args:
        tokenizer: such as `AutoTokenizer.from_pretrained` returns.

    Raises:
        ValueError: a tokenizer without an end-of-text token.
    """

    def __init__(self, tokenizer: Any) -> None:
        if tokenizer.eos_token_id is None:
            raise ValueError("tokenizer must have an end-of-text token")
        bos = tokenizer.bos_token_id
        self.tokenizer = tokenizer
        self.eos_id = int(tokenizer.eos_token_id)
        self.prefix_id = self.eos_id if bos is None else int(bos)
        self.fingerprint = str(tokenizer.name_or_path).replace("/", "__")
        self._prefix = self.decode_all([self.prefix_id])

    def encode(self, text: str) -> Ids:
        """Token ids of `text` with the special tokens that the tokenizer puts around a text."""
        ids: Ids = self.tokenizer.encode(text, add_special_tokens=not text.startswith(self._prefix))
        return ids

    def encode_plain(self, text: str) -> Ids:
        """Token ids of `text` alone."""
        ids: Ids = self.tokenizer.encode(text, add_special_tokens=False)
        return ids

    def decode(self, ids: Ids) -> str:
        """Text of `ids`; special tokens are left out."""
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def decode_all(self, ids: Ids) -> str:
        """Text of `ids`; special tokens are written out."""
        text: str = self.tokenizer.decode(ids, skip_special_tokens=False)
        return text


def encode_long(tokenizer: Tokenizer, text: str) -> Ids:
    """Token ids of a text of any length, without the end-of-text token."""
    ids: Ids = encode_document(tokenizer, text)[:-1].tolist()
    return ids
