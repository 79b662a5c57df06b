"""The sequence mixers of the library: what they have in common, and the table of their names.

To add one: write a module that follows `Mixer`, and add a line to `MIXERS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Protocol

from torch import Tensor, nn

from nested_learning.layers.attention import Attention
from nested_learning.layers.config import MemoryConfig
from nested_learning.layers.documents import Documents
from nested_learning.layers.linear import GatedDeltaRule
from nested_learning.layers.self_modifying import SelfModifyingTitans, TitansMemory
from nested_learning.ops.memory_mlp.chunk import WriteRule


class Mixer(Protocol):
    """A layer that mixes the tokens of a sequence and carries an explicit state."""

    def init_state(self, batch: int) -> Any:
        """State at the start of a context."""
        ...

    def __call__(
        self, x: Tensor, state: Any = None, documents: Documents | None = None
    ) -> tuple[Tensor, Any]:
        """`x [B, T, D]` → (`y [B, T, D]`, state); any split of a sequence gives the same outputs.

        `documents`: those of x, each processed as if it were alone in a row; only without a state.
        """
        ...


class MixerConfig(Protocol):
    """What mixers read of a model's configuration (`HopeConfig`)."""

    dim: int
    num_heads: int
    chunk_size: int
    read: str
    memory: MemoryConfig
    window: int
    rope_base: float


@dataclass(frozen=True)
class MixerKind:
    """A mixer by name.

    Args:
        build: makes it.
        reads: the options of `MixerConfig` that it reads, those of the memories as "memory.delta"; besides
            these, `dim`, `num_heads` and `chunk_size`. Others are refused where they are set.
    """

    build: Callable[[MixerConfig], nn.Module]
    reads: frozenset[str]


def _memory(*names: str) -> frozenset[str]:
    return frozenset(f"memory.{name}" for name in names)


ALL_OF_MEMORY = _memory(*(field.name for field in fields(MemoryConfig)))
WRITE = _memory(*(field.name for field in fields(WriteRule)))  # every two-layer memory reads these
SELF_MODIFICATION = _memory("adaptive", "self_targets", "stop_gradient_targets", "projection_chunk_size")
LINEAR = _memory(
    "delta", "momentum", "retention", "eta_max", "eta_bias", "alpha_bias", "keep_every", "conv_window"
)
FAST_LEVEL = WRITE | _memory("eta_bias", "alpha_bias", "keep_every")
"""What fast levels of a Continuum Memory System read."""

MIXERS: dict[str, MixerKind] = {
    "self_mod": MixerKind(
        lambda c: SelfModifyingTitans(c.dim, c.num_heads, c.chunk_size, c.read, c.memory),
        ALL_OF_MEMORY | {"read"},
    ),
    "titans": MixerKind(
        lambda c: TitansMemory(c.dim, c.num_heads, c.chunk_size, c.read, c.memory),
        ALL_OF_MEMORY - SELF_MODIFICATION | {"read"},
    ),
    "linear": MixerKind(lambda c: GatedDeltaRule(c.dim, c.num_heads, c.chunk_size, c.memory), LINEAR),
    "attention": MixerKind(lambda c: Attention(c.dim, c.num_heads, c.rope_base), frozenset({"rope_base"})),
    "sliding_attention": MixerKind(
        lambda c: Attention(c.dim, c.num_heads, c.rope_base, c.window), frozenset({"rope_base", "window"})
    ),
}
