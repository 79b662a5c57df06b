"""The configuration of a model: plain dataclasses, validated where they are made."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Self

from nested_learning.checks import at_least, build, check_types, one_of, positive
from nested_learning.layers.config import ACTIVATIONS, READS, MemoryConfig
from nested_learning.layers.mixer import FAST_LEVEL, MIXERS
from nested_learning.levels import (
    VARIANTS,
    Event,
    LevelKind,
    LevelSpec,
    calendar,
    check_levels,
    kind_of,
    reset_periods,
)


@dataclass(kw_only=True, slots=True)
class HopeConfig:
    """A language model of identical blocks: a sequence mixer, then a feed-forward memory.

    Args:
        vocab_size: number of tokens.
        dim: model width.
        num_layers, num_heads: blocks, and heads per mixer (`num_heads` divides `dim`).
        mixer: "self_mod" | "self_mod_linear" | "titans" | "linear" | "attention" | "sliding_attention".
        levels: the levels of the feed-forward memory, in the order they are applied.
        cms_variant: how the levels are put together: "sequential", "nested" or "independent".
        cms_per_head: softmax weights of their own for the channels of every head ("independent" only).
        seq_len: tokens of a training sequence (`train.seq_len` in files). A level with a longer period is
            slow: an ordinary MLP that the optimizer steps every `chunk_size / seq_len` steps. None = no
            level is slow.
        chunk_size: tokens between two writes of M_memory.
        read: which weights a token reads: those at the start of its chunk ("chunk", Eq. 90), those
            before its own write ("before_write", Eq. 86) or after it ("after_write", Titans).
        memory: how memories are written.
        output_gate: whether the mixer's output is gated by its input; None = as the mixer has it: that of
            memories is, that of attention is not.
        conv_window: tokens that the causal convolution of keys, values and queries sees, 1 = none; None = 4
            for memories, 1 for attention.
        activation: of keys, values and queries after the convolution, "none" or "silu"; None = as the mixer
            has it ("silu" for `linear`).
        window: tokens seen by "sliding_attention", itself included.
        rope_base: base of the rotary positions in attention.
        tie_embeddings: use the embedding as output head.
        norm_eps: added to mean squares in RMSNorm.
    """

    vocab_size: int = 512
    dim: int = 128
    num_layers: int = 3
    num_heads: int = 4
    mixer: str = "self_mod"
    levels: tuple[LevelSpec, ...] = field(default_factory=lambda: (LevelSpec(),))
    cms_variant: str = "sequential"
    cms_per_head: bool = False
    seq_len: int | None = None
    chunk_size: int = 64
    read: str = "chunk"
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    output_gate: bool | None = None
    conv_window: int | None = None
    activation: str | None = None
    window: int = 128
    rope_base: float = 10_000.0
    tie_embeddings: bool = True
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        check_types(self, "model")
        one_of("model.mixer", self.mixer, MIXERS)
        one_of("model.read", self.read, READS)
        if self.activation is not None:
            one_of("model.activation", self.activation, ACTIVATIONS)
        sizes = ("vocab_size", "dim", "num_layers", "num_heads", "chunk_size", "window", "seq_len")
        for name in (*sizes, "conv_window"):
            at_least(f"model.{name}", getattr(self, name), 1)
        for name in ("rope_base", "norm_eps"):
            positive(f"model.{name}", getattr(self, name))
        if self.dim % self.num_heads:
            raise ValueError(f"model.num_heads must divide model.dim = {self.dim}, got {self.num_heads}")
        if (self.dim // self.num_heads) % 2:
            raise ValueError(f"model.dim / model.num_heads must be even, got {self.dim // self.num_heads}")
        check_levels(self.levels, "model.levels")
        self._check_levels()
        self._check_unread()
        other = self.memory.projection_chunk_size
        if other is not None and max(other, self.chunk_size) % min(other, self.chunk_size):
            raise ValueError(
                "model.memory.projection_chunk_size must divide model.chunk_size or be a multiple of it, "
                f"got {other} and {self.chunk_size}"
            )

    def _check_levels(self) -> None:
        one_of("model.cms_variant", self.cms_variant, VARIANTS)
        if self.cms_per_head and self.cms_variant != "independent":
            raise ValueError(
                f"model.cms_per_head needs model.cms_variant = independent, got {self.cms_variant!r}"
            )
        for level in self.levels:
            where, period = f"model.levels.{level.name}", level.chunk_size
            if self.seq_len and period and period > self.seq_len and period % self.seq_len:
                raise ValueError(
                    f"{where}.chunk_size must be less than model.seq_len = {self.seq_len} or a multiple of "
                    f"it, got {period}"
                )
            if level.layers is not None and max(level.layers) >= self.num_layers:
                raise ValueError(
                    f"{where}.layers must be less than model.num_layers = {self.num_layers}, "
                    f"got {list(level.layers)}"
                )
        for layer in range(self.num_layers):
            if not self.levels_of(layer):
                raise ValueError(f"model.levels must leave every block a level, got none for block {layer}")
            reset_periods(self.levels_of(layer), self.cms_variant, self.seq_len)

    def with_mixer(self, mixer: str, **changes: Any) -> Self:
        """The same model with another mixer; options that it does not read go back to their defaults."""
        one_of("model.mixer", mixer, MIXERS)
        reads = self._reads(mixer)
        default, memory = type(self)(), MemoryConfig()
        names = [f.name for f in fields(memory) if f"memory.{f.name}" not in reads]
        changes.setdefault("memory", replace(self.memory, **{name: getattr(memory, name) for name in names}))
        unread = [name for name in ("read", "window", "rope_base") if name not in reads]
        return replace(self, mixer=mixer, **{name: getattr(default, name) for name in unread} | changes)

    @property
    def _has_fast_levels(self) -> bool:
        return any(self.level_kind(level) == "fast" for level in self.levels)

    def _reads(self, mixer: str) -> frozenset[str]:
        """The options that a mixer or these levels read."""
        return MIXERS[mixer].reads | (FAST_LEVEL if self._has_fast_levels else frozenset())

    def _check_unread(self) -> None:
        """Refuse an option that is set and that neither the mixer nor a level reads."""
        reads = self._reads(self.mixer)
        readers = f"model.mixer = {self.mixer}{' with fast levels' if self._has_fast_levels else ''}"
        defaults = HopeConfig.__dataclass_fields__
        values = {
            name: (getattr(self, name), defaults[name].default) for name in ("read", "window", "rope_base")
        }
        memory = MemoryConfig()
        for option in fields(memory):
            values[f"memory.{option.name}"] = (
                getattr(self.memory, option.name),
                getattr(memory, option.name),
            )
        for name, (value, default) in values.items():
            if value != default and name not in reads:
                who = ", ".join(mixer for mixer, kind in MIXERS.items() if name in kind.reads)
                raise ValueError(
                    f"model.{name} is not read by {readers}, so it must stay {default!r}, got {value!r}; "
                    f"it is an option of {who}"
                )
        for level in self.levels:
            if self.level_kind(level) != "fast" and (unread := level.fast_options()):
                name, value = unread[0]
                kind = self.level_kind(level)
                raise ValueError(
                    f"model.levels.{level.name}.{name} is read by fast levels only, and this level is {kind} "
                    f"(chunk_size = {level.chunk_size}, model.seq_len = {self.seq_len}); got {value!r}"
                )

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.dim // self.num_heads

    @property
    def alignment(self) -> int:
        """Tokens in a whole number of chunks of every memory: where documents of one row may begin."""
        has_memories = "memory.delta" in MIXERS[self.mixer].reads
        return math.lcm(self.cycle, self._longest_chunk if has_memories else 1)

    @property
    def cycle(self) -> int:
        """Tokens after which the shapes of a state repeat (but that of attention's, which grows): its pending
        tokens pile up until they are written. `linear` writes every token at once."""
        waits = "read" in MIXERS[self.mixer].reads  # tokens of a chunk read what others have not written yet
        levels = [level.chunk_size or 1 for level in self.levels if self.level_kind(level) == "fast"]
        return math.lcm(*levels, self._longest_chunk if waits else 1)

    @property
    def _longest_chunk(self) -> int:
        return max(self.chunk_size, self.memory.projection_chunk_size or 1)

    def levels_of(self, layer: int) -> tuple[LevelSpec, ...]:
        """The levels that block number `layer` has."""
        return tuple(level for level in self.levels if level.layers is None or layer in level.layers)

    def calendar(self, tokens: int, layer: int | None = None) -> list[Event]:
        """Which level updates, and which resets, after which token; see `levels.calendar`.

        Of block number `layer`, or of all blocks: then an event that several have is listed once. (A level of
        a nested CMS resets with the next slower one of its own block.)
        """
        blocks = range(self.num_layers) if layer is None else [layer]
        together = dict.fromkeys(
            event
            for block in blocks
            for event in calendar(self.levels_of(block), tokens, self.cms_variant, self.seq_len)
        )
        order = {level.name: number for number, level in enumerate(self.levels)}
        return sorted(together, key=lambda event: (event.token, order[event.level]))

    def level_kind(self, level: LevelSpec) -> LevelKind:
        """How a level is updated: in the forward pass ("fast"), by the optimizer every `chunk_size` tokens
        ("slow") or at every optimizer step ("plain")."""
        return kind_of(level, self.seq_len)

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionary, for checkpoints; `HopeConfig.from_dict` reads it back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Inverse of `to_dict`. An unknown key is a ValueError."""
        return build(cls, values, "model")
