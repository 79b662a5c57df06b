"""The one block of the library: a sequence mixer, then a feed-forward memory (Eqs. 94–97)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from nested_learning.layers.attention import Attention
from nested_learning.layers.checks import check_input, check_kind
from nested_learning.layers.cms import CMS
from nested_learning.layers.documents import Documents, check_documents, read_apart
from nested_learning.layers.linear import GatedDeltaRule
from nested_learning.layers.norm import RMSNorm
from nested_learning.layers.self_modifying import SelfModifyingTitans, TitansMemory
from nested_learning.models.config import HopeConfig
from nested_learning.state import LayerState


def build_mixer(config: HopeConfig) -> nn.Module:
    """The sequence mixer that `config.mixer` names."""
    dim, heads = config.dim, config.num_heads
    if config.mixer == "self_mod":
        return SelfModifyingTitans(dim, heads, config.chunk_size, config.read, config.memory)
    if config.mixer == "titans":
        return TitansMemory(dim, heads, config.chunk_size, config.read, config.memory)
    if config.mixer == "linear":
        return GatedDeltaRule(dim, heads, config.chunk_size, config.memory)
    window = config.window if config.mixer == "sliding_attention" else None
    return Attention(dim, heads, config.rope_base, window)


class HopeBlock(nn.Module):
    """x + mixer(norm(x)), then the Continuum Memory System.

    With attention and one ordinary level this is a pre-norm Transformer block.

    Args:
        config: of the model.
        layer: number of the block, which decides which levels it has.
    """

    def __init__(self, config: HopeConfig, layer: int = 0) -> None:
        super().__init__()
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.mixer = build_mixer(config)
        self.memory = CMS(
            config.dim,
            config.levels_of(layer),
            config.cms_variant,
            config.memory,
            config.norm_eps,
            config.seq_len,
            config.num_heads if config.cms_per_head else 1,
        )

    def init_state(self, batch: int, plain: bool = False) -> LayerState:
        """State at the start of a context. Attention has none until it has read something.

        `plain` makes ordinary MLPs fast weights of each sequence too (see `adapt`).
        """
        mixer = self.mixer
        start = None if isinstance(mixer, Attention) else mixer.init_state(batch)  # type: ignore[operator]
        return LayerState(start, self.memory.init_state(batch, plain))

    def forward(
        self, x: Tensor, state: LayerState | None = None, documents: Documents | None = None
    ) -> tuple[Tensor, LayerState]:
        """`x [B, T, D]` → (`y [B, T, D]`, state). `documents`: those of x, which starts a context."""
        check_input(x, self.norm.weight.shape[0], "HopeBlock")
        state = LayerState() if state is None else state
        check_kind(state, LayerState, "HopeBlock")
        mixed, mixer = self._mix(self.norm(x), state.mixer, documents)
        y, memory = self.memory(x + mixed, state.memory, documents)
        return y, LayerState(mixer, memory)

    def _mix(self, x: Tensor, state: Any, documents: Documents | None) -> tuple[Tensor, Any]:
        if documents is not None and not isinstance(self.mixer, Attention):
            check_documents(documents, x, state, "HopeBlock")
            return read_apart(self.mixer, x, documents)  # type: ignore[arg-type]
        mixed: tuple[Tensor, Any] = (
            self.mixer(x, state) if documents is None else self.mixer(x, state, documents)
        )
        return mixed
