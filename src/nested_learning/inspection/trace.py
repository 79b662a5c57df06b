"""What was seen of the memories of a model: one trace per memory, and the loss of every token.

Shapes: H heads, T tokens, W writes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from nested_learning.checks import one_of

TOKEN_VALUES = ("surprise", "eta", "alpha", "contribution")
WRITE_VALUES = ("change", "relative_change", "norm", "drift", "eta", "alpha")
SYMBOLS = {"k": "M_k", "v": "M_v", "q": "M_q", "eta": "M_η", "alpha": "M_α", "memory": "M", "linear": "W"}


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryTrace:
    """What one memory of one block did while a sequence was read; docs/inspection.md has the equations.

    Args:
        block: number of the block.
        name: "k", "v", "q", "eta", "alpha" or "memory" (M) of self-modifying Titans, "memory" of Titans,
            "linear", or "level:" and the name of a fast level.
        chunk: tokens between two writes.
        surprise: norm of the gradient at the memory's output that a token is written with `[H, T]`.
        eta, alpha: step size and retention of every token `[H, T]`.
        contribution: norm of what a token's write has added at the end of its chunk `[H, T]`; not a number
            where the chunk is not written yet.
        ends: tokens that were read when the memory was written, for every write.
        resets: whether that write put the memory back to its initial state instead.
        change: norm of the difference that a write made `[H, W]`.
        norm: of the memory at the start and after every write `[H, W + 1]`.
        drift: norm of the difference to the initial memory, likewise.
        rank: effective rank of every matrix of the memory, likewise.
    """

    block: int
    name: str
    chunk: int
    surprise: Tensor
    eta: Tensor
    alpha: Tensor
    contribution: Tensor
    ends: tuple[int, ...]
    resets: tuple[bool, ...]
    change: Tensor
    norm: Tensor
    drift: Tensor
    rank: dict[str, Tensor]

    @property
    def key(self) -> str:
        """Names the memory within a model, such as "0.eta"."""
        return f"{self.block}.{self.name}"

    @property
    def symbol(self) -> str:
        """How equations call it, such as "M_η"."""
        return SYMBOLS.get(self.name) or self.name.replace("level:", "level ")

    @property
    def label(self) -> str:
        """For people, such as "block 0, M_η"."""
        return f"block {self.block}, {self.symbol}"

    def per_token(self, value: str) -> Tensor:
        """One number per token over all heads `[T]`.

        η and α are means; norms are those of all heads together, √Σ over heads of squares.

        Raises:
            ValueError: `value` is none of `TOKEN_VALUES`.
        """
        one_of("value", value, TOKEN_VALUES)
        values: Tensor = getattr(self, value)
        return values.mean(0) if value in ("eta", "alpha") else values.square().sum(0).sqrt()

    def per_write(self, value: str) -> Tensor:
        """One number per write over all heads `[W]`: as `per_token`; η and α are means over the chunk.

        `relative_change` is the change over the norm before it (not a number, if that is 0).

        Raises:
            ValueError: `value` is none of `WRITE_VALUES`.
        """
        one_of("value", value, WRITE_VALUES)
        if value in ("eta", "alpha"):
            rates = self.per_token(value)
            starts = (0, *self.ends[:-1])
            means = [rates[a:b].mean() for a, b in zip(starts, self.ends, strict=True)]
            return rates.new_tensor([float(m) for m in means])
        if value == "relative_change":
            before = self.per_write_and_start("norm")[:-1]
            return self.per_write("change") / before.masked_fill(before == 0, math.nan)
        if value in ("norm", "drift"):
            return self.per_write_and_start(value)[1:]
        return self.change.square().sum(0).sqrt()

    def per_write_and_start(self, value: str) -> Tensor:
        """ "norm" or "drift" over all heads, at the start and after every write `[W + 1]`."""
        one_of("value", value, ("norm", "drift"))
        values: Tensor = getattr(self, value)
        return values.square().sum(0).sqrt()

    def most_moving(self, count: int) -> list[int]:
        """Positions of the tokens of largest contribution, the largest first, without those not written."""
        values = self.per_token("contribution").nan_to_num(nan=-1.0)
        order = values.argsort(descending=True, stable=True)[:count].tolist()
        return [t for t in order if values[t] > 0]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; None stands for what is not a number."""
        plain: dict[str, Any] = {
            "block": self.block,
            "name": self.name,
            "chunk": self.chunk,
            "ends": list(self.ends),
            "resets": list(self.resets),
        }
        for name in (*TOKEN_VALUES, "change", "norm", "drift"):
            plain[name] = to_plain(getattr(self, name).tolist())
        return plain | {"rank": {name: to_plain(rank.tolist()) for name, rank in self.rank.items()}}


@dataclass(frozen=True, kw_only=True, slots=True)
class Inspection:
    """What the memories of a model did while it read a text.

    Args:
        tokens: the text `[T]`.
        loss: of every token in nats, given those before it `[T]`; not a number for the first.
        memories: one trace each, by block.
    """

    tokens: Tensor
    loss: Tensor
    memories: tuple[MemoryTrace, ...]

    def __getitem__(self, key: str) -> MemoryTrace:
        """The memory of a `MemoryTrace.key`. Raises ValueError for one that is not there."""
        named = {memory.key: memory for memory in self.memories}
        one_of("memory", key, named)
        return named[key]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; None stands for what is not a number."""
        return {
            "tokens": self.tokens.tolist(),
            "loss": to_plain(self.loss.tolist()),
            "memories": [memory.to_dict() for memory in self.memories],
        }


def to_plain(values: Sequence[Any]) -> list[Any]:
    """Nested lists of numbers, with None for those that are not finite."""
    return [
        to_plain(v) if isinstance(v, list) else v if math.isfinite(v) else None  # JSON has no NaN
        for v in values
    ]
