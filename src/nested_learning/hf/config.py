"""The configuration of a model as transformers keeps it: `HopeConfig` in a `config.json`."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import PreTrainedConfig

from nested_learning.models.config import HopeConfig


class HopeForCausalLMConfig(PreTrainedConfig):  # type: ignore[misc]
    """All fields of a `HopeConfig`, under `hope`, and what transformers asks of every configuration.

    Args:
        hope: a `HopeConfig`, or what its `to_dict` gives; None = its defaults.
        training: what is known of the training, for the model card; plain values.
        options: of `PreTrainedConfig`, such as `eos_token_id`.

    Raises:
        ValueError: a field of `hope` that is unknown or out of range.
    """

    model_type = "hope"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    def __init__(
        self,
        hope: HopeConfig | dict[str, Any] | None = None,
        training: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        self.hope = _plain(hope)
        self.training = training or {}
        own = self.hope_config
        options.setdefault("tie_word_embeddings", own.tie_embeddings)
        self.vocab_size, self.hidden_size = own.vocab_size, own.dim
        self.num_hidden_layers, self.num_attention_heads = own.num_layers, own.num_heads
        super().__init__(**{name: value for name, value in options.items() if name not in DERIVED})

    @property
    def hope_config(self) -> HopeConfig:
        """The same as our own class."""
        return HopeConfig.from_dict(self.hope)


DERIVED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
"""Fields under the names of transformers, that follow from `hope`."""


def _plain(hope: HopeConfig | dict[str, Any] | None) -> dict[str, Any]:
    """A configuration in values that JSON has."""
    own = hope if isinstance(hope, HopeConfig) else HopeConfig.from_dict(dict(hope or {}))
    values = own.to_dict()
    values["levels"] = [dict(level) for level in values["levels"]]
    for level in values["levels"]:
        level["layers"] = None if level["layers"] is None else list(level["layers"])
    return values
