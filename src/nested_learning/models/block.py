"""The one block of the library: a sequence mixer, then a feed-forward memory (Eqs. 94–97)."""

from __future__ import annotations

from torch import Tensor, nn

from nested_learning.layers.checks import check_input, check_kind
from nested_learning.layers.cms import CMS
from nested_learning.layers.documents import Documents
from nested_learning.layers.mixer import MIXERS
from nested_learning.layers.norm import RMSNorm
from nested_learning.models.config import HopeConfig
from nested_learning.state import LayerState


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
        self.mixer = MIXERS[config.mixer].build(config)
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
        """State at the start of a context.

        `plain` makes ordinary MLPs fast weights of each sequence too (see `adapt`).
        """
        mixer = self.mixer.init_state(batch)  # type: ignore[operator]
        return LayerState(mixer, self.memory.init_state(batch, plain))

    def forward(
        self, x: Tensor, state: LayerState | None = None, documents: Documents | None = None
    ) -> tuple[Tensor, LayerState]:
        """`x [B, T, D]` → (`y [B, T, D]`, state). `documents`: those of x, which starts a context."""
        check_input(x, self.norm.weight.shape[0], "HopeBlock")
        state = LayerState() if state is None else state
        check_kind(state, LayerState, "HopeBlock")
        mixed, mixer = self.mixer(self.norm(x), state.mixer, documents)
        y, memory = self.memory(x + mixed, state.memory, documents)
        return y, LayerState(mixer, memory)
