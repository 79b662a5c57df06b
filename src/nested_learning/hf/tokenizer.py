"""Our tokenizers as transformers knows tokenizers: the same ids, the same text."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any, ClassVar

from transformers import PreTrainedTokenizer

from nested_learning.data.tokenizer import Tokenizer, load_tokenizer

END = "</s>"


class HopeTokenizer(PreTrainedTokenizer):  # type: ignore[misc]
    """A tokenizer of this package, kept in `tokenizer_config.json`.

    The end of a text is its only special token, and pads where something has to. Text that reads like it is
    plain text. A token is called by its number here, since pieces of text need not have names.

    Args:
        state: what `Tokenizer.state` gives, bytes in base64; None = the byte tokenizer.
        options: of transformers.
    """

    vocab_files_names: ClassVar[dict[str, str]] = {}
    model_input_names: ClassVar[list[str]] = ["input_ids", "attention_mask"]

    def __init__(self, state: dict[str, str] | None = None, **options: Any) -> None:
        kept = state or {"kind": "byte"}
        model = {"model": base64.b64decode(kept["model"])} if "model" in kept else {}
        self.own: Tokenizer = load_tokenizer({"kind": kept["kind"], **model})
        fixed = {"eos_token": END, "pad_token": END, "split_special_tokens": True}
        options = {**options, **fixed, "clean_up_tokenization_spaces": False}
        self._added_tokens_decoder: dict[int, Any] = {}
        super().__init__(state=kept, **options)

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> HopeTokenizer:
        """The same tokenizer for transformers."""
        state = {
            name: base64.b64encode(value).decode("ascii") if isinstance(value, bytes) else value
            for name, value in tokenizer.state().items()
        }
        return cls(state)

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""
        return self.own.vocab_size

    def get_vocab(self) -> dict[str, int]:
        """Name of a token → its id."""
        return {self._convert_id_to_token(token): token for token in range(self.vocab_size)}

    def _tokenize(self, text: str, **options: Any) -> list[str]:
        return [self._convert_id_to_token(token) for token in self.own.encode(text)]

    def _convert_token_to_id(self, token: str) -> int:
        return self.own.eos_id if token == END else int(token[1:-1])

    def _convert_id_to_token(self, index: int) -> str:
        return END if index == self.own.eos_id else f"<{index}>"

    def convert_tokens_to_string(self, tokens: Sequence[str]) -> str:
        """The text of tokens, with the end of a text as `</s>`."""
        parts: list[list[int]] = [[]]
        for token in tokens:
            if token == END:
                parts.append([])
            else:
                parts[-1].append(self._convert_token_to_id(token))
        return END.join(self.own.decode(part) for part in parts)

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        """Nothing: `tokenizer_config.json` holds all of it."""
        return ()
