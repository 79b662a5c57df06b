"""Levels of a Continuum Memory System: who updates, and how often (in tokens)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

LevelKind = Literal["fast", "slow", "plain"]


@dataclass(kw_only=True, slots=True)
class LevelSpec:
    """One level of the Continuum Memory System (§7.1 of the paper).

    A level without a `chunk_size` is plain: an ordinary SwiGLU MLP. One whose `chunk_size` is less than the
    training sequence is fast: a fast weight of each sequence, written in the forward pass. One whose
    `chunk_size` is more is slow: a SwiGLU MLP that the optimizer steps every `chunk_size` tokens.

    Args:
        name: unique within a model; names the level in calendars, logs and checkpoints.
        chunk_size: update period in tokens, or None for an ordinary MLP.
        expansion: hidden width over model width; None = 8/3 for an ordinary MLP, 1 for a fast level.
    """

    name: str = "mlp"
    chunk_size: int | None = None
    expansion: float | None = None

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("levels.name must not be empty")
        if self.chunk_size is not None and self.chunk_size < 1:
            raise ValueError(f"levels.{self.name}.chunk_size must be at least 1, got {self.chunk_size}")
        if self.expansion is not None and self.expansion <= 0:
            raise ValueError(f"levels.{self.name}.expansion must be positive, got {self.expansion}")


def kind_of(level: LevelSpec, seq_len: int | None) -> LevelKind:
    """Whether a level is "fast", "slow" or "plain" where training sequences have `seq_len` tokens.

    None = sequences without end: no level is slow.
    """
    if level.chunk_size is None:
        return "plain"
    return "slow" if seq_len is not None and level.chunk_size > seq_len else "fast"


class ChunkedUpdateScheduler:
    """Clocks of levels that update at optimizer steps C, 2C, 3C, … (Eq. 71, with steps in place of tokens).

    Steps count from 1. The scheduler says who is due and keeps count; it updates nothing.

    Args:
        chunk_sizes: name of a level → steps between two of its updates.

    Raises:
        ValueError: no level, or a chunk size that is not an integer of at least 1.

    Example:
        >>> scheduler = ChunkedUpdateScheduler({"fast": 1, "slow": 4})
        >>> scheduler.calendar(8)
        {'fast': [1, 2, 3, 4, 5, 6, 7, 8], 'slow': [4, 8]}
    """

    def __init__(self, chunk_sizes: Mapping[str, int]) -> None:
        if not chunk_sizes:
            raise ValueError("chunk_sizes must name at least one level")
        for name, size in chunk_sizes.items():
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ValueError(f"chunk_sizes[{name!r}] must be an integer of at least 1, got {size!r}")
        self.chunk_sizes = dict(chunk_sizes)
        self.updates = dict.fromkeys(self.chunk_sizes, 0)
        self.last_update = dict.fromkeys(self.chunk_sizes, 0)

    def should_update(self, name: str, step: int) -> bool:
        """Whether level `name` is due at `step`: a multiple of its chunk size.

        Raises:
            ValueError: an unknown level, or a step below 1.
        """
        if name not in self.chunk_sizes:
            raise ValueError(f"level must be one of {', '.join(self.chunk_sizes)}, got {name!r}")
        if step < 1:
            raise ValueError(f"step must be at least 1 (steps count from 1), got {step}")
        return step % self.chunk_sizes[name] == 0

    def due(self, step: int) -> list[str]:
        """Names of the levels that are due at `step`."""
        return [name for name in self.chunk_sizes if self.should_update(name, step)]

    def mark_updated(self, name: str, step: int) -> None:
        """Count an update of level `name` made at `step`.

        Raises:
            ValueError: the level is not due at `step`, or has had an update at it or later.
        """
        if not self.should_update(name, step):
            size = self.chunk_sizes[name]
            raise ValueError(f"level {name!r} updates at multiples of {size} steps, not at step {step}")
        if step <= self.last_update[name]:
            raise ValueError(
                f"level {name!r} is already marked as updated at step {self.last_update[name]}, got step {step}"
            )
        self.updates[name] += 1
        self.last_update[name] = step

    def statistics(self) -> dict[str, dict[str, int]]:
        """Per level: `chunk_size`, number of `updates`, and step of the `last_update` (0 = none yet)."""
        return {
            name: {"chunk_size": size, "updates": self.updates[name], "last_update": self.last_update[name]}
            for name, size in self.chunk_sizes.items()
        }

    def calendar(self, steps: int) -> dict[str, list[int]]:
        """Per level, the steps among 1 … `steps` at which it updates."""
        return {name: list(range(size, steps + 1, size)) for name, size in self.chunk_sizes.items()}

    def state_dict(self) -> dict[str, Any]:
        """Everything that `load_state_dict` needs, as plain values."""
        return {
            "chunk_sizes": dict(self.chunk_sizes),
            "updates": dict(self.updates),
            "last_update": dict(self.last_update),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`.

        Raises:
            ValueError: it is of other levels or chunk sizes.
        """
        if state["chunk_sizes"] != self.chunk_sizes:
            raise ValueError(
                f"chunk_sizes must be {self.chunk_sizes}, the saved ones are {state['chunk_sizes']}"
            )
        self.updates = dict(state["updates"])
        self.last_update = dict(state["last_update"])
