"""`HopeForCausalLM`: our model behind the interface of transformers.

It adds nothing to what the model computes. Our state is its cache: an output's `past_key_values` holds the
state after what was read, and is given back with the next tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from nested_learning.hf.card import write_card
from nested_learning.hf.config import HopeForCausalLMConfig
from nested_learning.models.lm import HopeLM
from nested_learning.state import ModelState

RAGGED = (
    "rows of different lengths go into `model.model.generate` or `generate_text` (docs/generation.md), which "
    "read each as if alone; here a memory would read the padding"
)


@dataclass
class StateCache:
    """A state as transformers hands it on. A call never changes what it holds, but for the order of rows."""

    state: ModelState
    is_compileable = False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """How many tokens the state has read."""
        return self.state.position

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Put rows into another order, some perhaps several times: `beam_idx [N]`."""
        self.state = self.state.rows(beam_idx)


class HopeForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """A HOPE language model, or one of its baselines, for transformers. `model` is the `HopeLM` itself.

    Raises:
        ValueError: a configuration that `HopeConfig` refuses.
    """

    config_class = HopeForCausalLMConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    _no_split_modules: ClassVar[list[str]] = ["HopeBlock"]
    _is_stateful = True  # a memory cannot be cut back to an earlier token
    supports_gradient_checkpointing = False

    def __init__(self, config: HopeForCausalLMConfig) -> None:
        super().__init__(config)
        self.model = HopeLM(config.hope_config)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """`HopeLM` has initialised itself."""

    @classmethod
    def from_pretrained(cls, name: str | PathLike[str], *inputs: Any, **options: Any) -> Any:
        """See transformers. Weights must fit: none may be missing, left over or of another shape.

        Raises:
            ValueError: naming the first that does not fit.
        """
        wanted = options.pop("output_loading_info", False)
        model, info = super().from_pretrained(name, *inputs, output_loading_info=True, **options)
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if wrong := sorted(map(str, info.get(kind, ()))):
                raise ValueError(f"{name}: {kind.replace('_keys', '')} weight {wrong[0]} of {len(wrong)}")
        return (model, info) if wanted else model

    def save_pretrained(self, save_directory: str | PathLike[str], *inputs: Any, **options: Any) -> None:
        """See transformers; writes a model card, too, unless the folder has one."""
        super().save_pretrained(save_directory, *inputs, **options)
        if options.get("is_main_process", True):
            write_card(self.config, save_directory)

    def get_input_embeddings(self) -> nn.Module:
        """The embedding of tokens."""
        return self.model.embedding

    def get_output_embeddings(self) -> nn.Module | None:
        """The head; None where it is the embedding."""
        return self.model.head

    def resize_token_embeddings(self, *arguments: Any, **options: Any) -> Any:
        """Refused: the vocabulary is part of the model's configuration.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("the vocabulary of a HOPE model cannot be resized; train one with another")

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, *arguments: Any, **options: Any
    ) -> Any:
        if generation_config.cache_implementation is not None:
            raise ValueError(
                f"cache_implementation must be None, got {generation_config.cache_implementation!r}: "
                "the cache of a HOPE model is its state"
            )
        return super()._prepare_cache_for_generation(generation_config, *arguments, **options)

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        """See transformers. Only new tokens are read. Raises ValueError for prompts with padding."""
        mask = kwargs.get("attention_mask")
        if mask is not None and not bool((mask != 0).all()):
            raise ValueError(f"attention_mask holds padding; {RAGGED}")
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(input_ids, **kwargs)
        return {**inputs, "attention_mask": None, "position_ids": None}

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: StateCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        **others: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """`input_ids [B, T]` → logits `[B, T, V]`, the loss of `labels`, and the state as `past_key_values`.

        Args:
            attention_mask: `[B, T]` or longer; 0 only at the end of rows, where padding reaches no token
                before it. Such a call gives no cache.
            labels: `[B, T]`, shifted here; −100 is not counted.
            use_cache: give the state back; None = but not in training mode.
            logits_to_keep: compute logits of the last so many tokens, or of these, only; 0 = of all.
            num_items_in_batch: divides the summed loss; None = the number of labels.

        Raises:
            ValueError: what this model cannot use, by name.
        """
        for name, value in others.items():
            if value is not None and value is not False:
                raise ValueError(f"{name} is not supported by HopeForCausalLM; got {type(value).__name__}")
        if input_ids is None:
            raise ValueError("input_ids is missing; inputs_embeds and others are not supported")
        padded = attention_mask is not None and _ends_in_padding(attention_mask[:, -input_ids.shape[1] :])
        if padded and past_key_values is not None:
            raise ValueError(f"attention_mask holds padding beside a cache; {RAGGED}")
        cached = not self.training if use_cache is None else use_cache
        before = None if past_key_values is None else _state_of(past_key_values)
        logits, state = self.model(input_ids, before)
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits, labels, vocab_size=self.config.vocab_size, num_items_in_batch=num_items_in_batch
            )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        cache = StateCache(state) if cached and not padded else None
        output = CausalLMOutputWithPast(loss=loss, logits=logits[:, kept], past_key_values=cache)
        return (
            output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()
        )


def _state_of(cache: Any) -> ModelState:
    """The state in a cache. Raises ValueError for a cache of another kind."""
    if not isinstance(cache, StateCache):
        raise ValueError(f"past_key_values must be a StateCache, got {type(cache).__name__}")
    return cache.state


def _ends_in_padding(mask: Tensor) -> bool:
    """Whether rows of `mask [B, T]` end in zeros. Raises ValueError for a zero before a one."""
    shown = mask != 0
    if bool((shown[:, 1:] & ~shown[:, :-1]).any()):
        raise ValueError(f"attention_mask hides tokens before others that it shows (left padding); {RAGGED}")
    if not bool(shown[:, 0].all()):
        raise ValueError("attention_mask hides a whole row")
    return not bool(torch.all(shown))
