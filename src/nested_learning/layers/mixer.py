"""The sequence mixers of the library: what they have in common, and the table of their names.

To add one: write a module that follows `Mixer`, and add a line to `MIXERS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any, Protocol

from torch import Tensor, nn

from nested_learning.layers.attention import PLAIN, Attention
from nested_learning.layers.config import Around, MemoryConfig
from nested_learning.layers.documents import Documents
from nested_learning.layers.linear import AROUND, GatedDeltaRule
from nested_learning.layers.self_modifying import SelfModifyingTitans, TitansMemory
from nested_learning.layers.self_modifying_linear import SelfModifyingLinear
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
    output_gate: bool | None
    conv_window: int | None
    activation: str | None


@dataclass(frozen=True)
class MixerKind:
    """A mixer by name.

    Args:
        make: makes it.
        reads: the options of `MixerConfig` that it reads, those of the memories as "memory.delta"; besides
            these, `dim`, `num_heads`, `chunk_size` and what stands around it. Others are refused where they
            are set.
        around: what stands around it where the configuration leaves that open.
    """

    make: Callable[[MixerConfig, Around], nn.Module]
    reads: frozenset[str]
    around: Around = field(default_factory=Around)

    def build(self, config: MixerConfig) -> nn.Module:
        """The mixer that `config` describes."""
        return self.make(config, self.surroundings(config))

    def surroundings(self, config: MixerConfig) -> Around:
        """What stands around it: as `config` says, and its own where that leaves it open."""
        given = {f.name: getattr(config, f.name) for f in fields(Around)}
        chosen = {name: value for name, value in given.items() if value is not None}
        return replace(self.around, **chosen)


def _memory(*names: str) -> frozenset[str]:
    return frozenset(f"memory.{name}" for name in names)


ALL_OF_MEMORY = _memory(*(field.name for field in fields(MemoryConfig)))
WRITE = _memory(*(field.name for field in fields(WriteRule)))  # every two-layer memory reads these
SELF_MODIFICATION = _memory(
    "adaptive", "self_targets", "stop_gradient_targets", "projection_chunk_size", "projection_eta_max"
)
LINEAR = _memory(
    "delta", "momentum", "retention", "eta_max", "step_control", "eta_bias", "alpha_bias", "keep_every"
)
SHARED_GAIN = LINEAR | _memory("retention_target", "adaptive", "injection_cap")
FAST_LEVEL = WRITE | _memory("eta_bias", "alpha_bias", "keep_every")
"""What fast levels of a Continuum Memory System read."""

MIXERS: dict[str, MixerKind] = {
    "self_mod": MixerKind(
        lambda c, a: SelfModifyingTitans(c.dim, c.num_heads, c.chunk_size, c.read, c.memory, a),
        ALL_OF_MEMORY - _memory("injection_cap") | {"read"},
    ),
    "self_mod_linear": MixerKind(
        lambda c, a: SelfModifyingLinear(c.dim, c.num_heads, c.chunk_size, c.read, c.memory, a),
        SHARED_GAIN | {"read"},
    ),
    "titans": MixerKind(
        lambda c, a: TitansMemory(c.dim, c.num_heads, c.chunk_size, c.read, c.memory, a),
        ALL_OF_MEMORY - SELF_MODIFICATION - _memory("injection_cap") | {"read"},
    ),
    "linear": MixerKind(
        lambda c, a: GatedDeltaRule(c.dim, c.num_heads, c.chunk_size, c.memory, a),
        LINEAR,
        AROUND,
    ),
    "attention": MixerKind(
        lambda c, a: Attention(c.dim, c.num_heads, c.rope_base, around=a), frozenset({"rope_base"}), PLAIN
    ),
    "sliding_attention": MixerKind(
        lambda c, a: Attention(c.dim, c.num_heads, c.rope_base, c.window, a),
        frozenset({"rope_base", "window"}),
        PLAIN,
    ),
}
