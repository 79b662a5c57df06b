"""The configuration of the memories, validated where it is made."""

from __future__ import annotations

import math
from dataclasses import dataclass

from nested_learning.checks import at_least, check_types, one_of
from nested_learning.ops.self_modifying.chunk import SelfModRule

READS: tuple[str, ...] = ("chunk", "before_write", "after_write")
ADAPTIVE: tuple[str, ...] = ("k", "v", "q", "eta", "alpha")
ACTIVATIONS: tuple[str, ...] = ("none", "silu")


@dataclass(frozen=True, kw_only=True, slots=True)
class Around:
    """What stands around the memory of a mixer, whatever it is: between projections and keys, and behind it.

    Args:
        output_gate: the layer's output is W_out(y ⊙ gate(x)) instead of W_out y, with a D × D projection.
        conv_window: tokens that the causal convolution of keys, values and queries sees; 1 = only their own.
        activation: of keys, values and queries after the convolution, "none" or "silu".
    """

    output_gate: bool = True
    conv_window: int = 4
    activation: str = "none"

    def __post_init__(self) -> None:
        one_of("model.activation", self.activation, ACTIVATIONS)
        at_least("model.conv_window", self.conv_window, 1)


@dataclass(kw_only=True, slots=True)
class MemoryConfig(SelfModRule):
    """How the memories of a mixer (all but attention have some), and of fast levels, are made and written.

    The options of the write itself are those of `WriteRule` and `SelfModRule`.

    Args:
        projection_chunk_size: chunk of the adaptive projections in tokens; None = the chunk of M_memory.
        hidden: hidden width of a memory per head; None = width of the head.
        eta_bias: initial logit of η / eta_max; None: η starts at 1/20 in `self_mod` and `titans`, at 0.27 in
            `linear` and at 1/128 elsewhere (or at half of its bound, if that is less).
        alpha_bias: initial logit of α.
        keep_every: store for the backward pass only the memories at the start of every so many chunks, and
            recompute the rest: less memory, more time, the same gradient. None = store intermediates.
    """

    projection_chunk_size: int | None = None
    hidden: int | None = None
    eta_bias: float | None = None
    alpha_bias: float = 8.0
    keep_every: int | None = None

    def __post_init__(self) -> None:
        where = "model.memory"
        check_types(self, where)
        self.check(where)
        for name in self.adaptive:
            one_of(f"{where}.adaptive", name, ADAPTIVE)
        if self.injection_cap and (self.momentum or not self.retention or self.to_initial):
            raise ValueError(
                f"{where}.injection_cap needs retention towards zero and no momentum, got momentum = "
                f"{self.momentum}, retention = {self.retention}, retention_target = {self.retention_target!r}"
            )
        for name in ("projection_chunk_size", "hidden", "keep_every"):
            at_least(f"{where}.{name}", getattr(self, name), 1)

    def step_bias(self, start: float, limit: float) -> float:
        """Initial logit of η over its bound `limit`; `start`: the initial η where no bias is set."""
        if self.eta_bias is not None:
            return self.eta_bias
        share = min(start / limit, 0.5)
        return math.log(share / (1 - share))
