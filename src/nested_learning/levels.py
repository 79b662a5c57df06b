"""Levels of a Continuum Memory System: who updates, and how often (in tokens)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from nested_learning.checks import check_types, one_of

LevelKind = Literal["fast", "slow", "plain"]
VARIANTS: tuple[str, ...] = ("sequential", "nested", "independent")
KEYS: tuple[str, ...] = ("input", "projected")
TARGETS: tuple[str, ...] = ("next", "same")


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
        layers: numbers of the blocks that have this level; elsewhere it is absent. None = all blocks.
        eta: fixed step size of the writes, in (0, 1]; None = learned from the input. Fast levels only, as
            all that follows.
        retention, delta, momentum: as in `MemoryConfig`; None = what the model's memories do.
        key: what the level is written at: its own "input" (the answer to which it has computed anyway) or
            a "projected" one.
        target: what it learns to answer: a projection of the "next" input (written when that is known), or
            of the "same" one.
        gain: its answers, which are small and change with every write, go through a norm with a learned
            gain that starts here. None = no norm.
    """

    name: str = "mlp"
    chunk_size: int | None = None
    expansion: float | None = None
    layers: tuple[int, ...] | None = None
    eta: float | None = None
    retention: bool | None = None
    delta: bool | None = None
    momentum: bool | None = None
    key: str = "input"
    target: str = "next"
    gain: float | None = 0.1

    def __post_init__(self) -> None:
        check_types(self, f"model.levels.{self.name}")
        if not self.name:
            raise ValueError("model.levels: a name must not be empty")
        self._check(self.chunk_size is None or self.chunk_size >= 1, "chunk_size", "at least 1")
        self._check(self.expansion is None or self.expansion > 0, "expansion", "positive")
        self._check(self.eta is None or 0 < self.eta <= 1, "eta", "in (0, 1] or null")
        self._check(self.gain is None or self.gain > 0, "gain", "positive or null")
        self._check(self.key in KEYS, "key", f"one of {', '.join(KEYS)}")
        self._check(self.target in TARGETS, "target", f"one of {', '.join(TARGETS)}")
        if self.layers is not None:
            distinct = len(set(self.layers)) == len(self.layers) > 0
            self._check(
                distinct and min(self.layers) >= 0, "layers", "different block numbers from 0, or null"
            )

    def fast_options(self) -> list[tuple[str, Any]]:
        """The options of fast levels that are set, with their values."""
        default = LevelSpec()
        return [
            (name, getattr(self, name))
            for name in ("eta", "retention", "delta", "momentum", "key", "target", "gain")
            if getattr(self, name) != getattr(default, name)
        ]

    def _check(self, ok: bool, name: str, allowed: str) -> None:
        if not ok:
            raise ValueError(
                f"model.levels.{self.name}.{name} must be {allowed}, got {getattr(self, name)!r}"
            )


def check_levels(levels: Sequence[LevelSpec], where: str = "levels") -> None:
    """Refuse levels that are none, no `LevelSpec`, or not told apart by their names.

    Raises:
        ValueError: naming `where` they stand.
    """
    if not levels:
        raise ValueError(f"{where} must hold at least one level")
    for level in levels:
        if not isinstance(level, LevelSpec):
            raise ValueError(f"{where} must hold LevelSpec, got {type(level).__name__}")
    names = [level.name for level in levels]
    if len(set(names)) != len(names):
        raise ValueError(f"{where} must have different names, got {names}")


def kind_of(level: LevelSpec, seq_len: int | None) -> LevelKind:
    """Whether a level is "fast", "slow" or "plain" where training sequences have `seq_len` tokens.

    None = sequences without end: no level is slow.
    """
    if level.chunk_size is None:
        return "plain"
    return "slow" if seq_len is not None and level.chunk_size > seq_len else "fast"


def reset_periods(
    levels: Sequence[LevelSpec], variant: str = "sequential", seq_len: int | None = None
) -> list[int | None]:
    """Tokens after which each level goes back to its initial state within a sequence; None = never.

    In the nested variant (Eq. 72) that is the period of the next slower fast level.

    Raises:
        ValueError: an unknown variant, or a nested one whose periods do not divide one another.
    """
    one_of("CMS variant", variant, VARIANTS)
    fast = {level.name: level.chunk_size for level in levels if kind_of(level, seq_len) == "fast"}
    periods = sorted({period for period in fast.values() if period is not None})
    if variant != "nested":
        return [None] * len(levels)
    if any(slow % quick for quick, slow in pairwise(periods)):
        raise ValueError(f"chunk sizes of nested fast levels must divide one another, got {periods}")
    slower: dict[int | None, int | None] = dict(pairwise([*periods, None]))
    return [slower.get(fast.get(level.name)) for level in levels]


@dataclass(frozen=True, slots=True)
class Event:
    """What a level does after `token` tokens.

    `kind` is "update" (a write in the forward pass), "reset" (back to the initial state: in place of the
    update in the nested variant, or because the sequence ends), or "step" (of the optimizer).
    """

    token: int
    level: str
    kind: Literal["update", "reset", "step"]


def calendar(
    levels: Sequence[LevelSpec], tokens: int, variant: str = "sequential", seq_len: int | None = None
) -> list[Event]:
    """Which level updates, and which resets, after which token, in order of time.

    Args:
        levels: the levels, in the order they are applied.
        tokens: length of the calendar.
        variant: of the Continuum Memory System.
        seq_len: tokens of a training sequence: where it ends, fast levels reset, plain levels are stepped,
            and slow ones if their period ends too. None = one sequence, and no optimizer.

    Raises:
        ValueError: fewer than one token, or a part of one; see `reset_periods`.
    """
    if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
        raise ValueError(f"tokens must be an integer of at least 1, got {tokens!r}")
    resets = reset_periods(levels, variant, seq_len)
    events = []
    for level, reset in zip(levels, resets, strict=True):
        kind = kind_of(level, seq_len)
        if kind == "fast":
            events += _fast_events(level, tokens, reset, seq_len or tokens)
        elif seq_len is not None:
            period = level.chunk_size or seq_len
            events += [Event(t, level.name, "step") for t in range(period, tokens + 1, period)]
    return sorted(events, key=lambda event: event.token)  # stable: levels in order at the same token


def _fast_events(level: LevelSpec, tokens: int, reset: int | None, seq_len: int) -> list[Event]:
    events = []
    assert level.chunk_size is not None
    for start in range(0, tokens, seq_len):
        if start:
            events.append(Event(start, level.name, "reset"))
        end = min(seq_len, tokens - start)
        for t in range(level.chunk_size, end + 1, level.chunk_size):
            again = reset is not None and t % reset == 0
            events.append(Event(start + t, level.name, "reset" if again else "update"))
    return events


class ChunkedUpdateScheduler:
    """Clocks of levels that update at optimizer steps C, 2C, 3C, … (Eq. 71, with steps in place of tokens).

    Steps count from 1. The scheduler says which levels are due and counts their updates; it updates nothing.

    Args:
        periods: name of a level → steps between two of its updates.

    Raises:
        ValueError: no level, or a period that is not an integer of at least 1.

    Example:
        >>> scheduler = ChunkedUpdateScheduler({"fast": 1, "slow": 4})
        >>> scheduler.calendar(8)
        {'fast': [1, 2, 3, 4, 5, 6, 7, 8], 'slow': [4, 8]}
    """

    def __init__(self, periods: Mapping[str, int]) -> None:
        if not periods:
            raise ValueError("periods must name at least one level")
        for name, period in periods.items():
            if isinstance(period, bool) or not isinstance(period, int) or period < 1:
                raise ValueError(f"periods[{name!r}] must be an integer of at least 1, got {period!r}")
        self.periods = dict(periods)
        self.updates = dict.fromkeys(self.periods, 0)
        self.last_update = dict.fromkeys(self.periods, 0)

    def should_update(self, name: str, step: int) -> bool:
        """Whether level `name` is due at `step`: a multiple of its period.

        Raises:
            ValueError: an unknown level, or a step that is not an integer of at least 1.
        """
        one_of("level", name, self.periods)
        if isinstance(step, bool) or not isinstance(step, int) or step < 1:
            raise ValueError(f"step must be an integer of at least 1 (steps count from 1), got {step!r}")
        return step % self.periods[name] == 0

    def due(self, step: int) -> list[str]:
        """Names of the levels that are due at `step`."""
        return [name for name in self.periods if self.should_update(name, step)]

    def mark_updated(self, name: str, step: int) -> None:
        """Count an update of level `name` made at `step`.

        Raises:
            ValueError: the level is not due at `step`, or has had an update at it or later.
        """
        if not self.should_update(name, step):
            period = self.periods[name]
            raise ValueError(f"level {name!r} updates at multiples of {period} steps, not at step {step}")
        last = self.last_update[name]
        if step <= last:
            raise ValueError(f"level {name!r} is already marked as updated at step {last}, got step {step}")
        self.updates[name] += 1
        self.last_update[name] = step

    def statistics(self) -> dict[str, dict[str, int]]:
        """Per level: `period`, number of `updates`, and step of the `last_update` (0 = none yet)."""
        return {
            name: {"period": period, "updates": self.updates[name], "last_update": self.last_update[name]}
            for name, period in self.periods.items()
        }

    def calendar(self, steps: int) -> dict[str, list[int]]:
        """Per level, the steps among 1 … `steps` at which it updates."""
        return {name: list(range(period, steps + 1, period)) for name, period in self.periods.items()}

    def state_dict(self) -> dict[str, Any]:
        """Everything that `load_state_dict` needs, as plain values."""
        return {
            "periods": dict(self.periods),
            "updates": dict(self.updates),
            "last_update": dict(self.last_update),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from a `state_dict`.

        Raises:
            ValueError: it is of other levels or periods, or no state of a scheduler.
        """
        saved = state.get("periods", state.get("chunk_sizes"))  # the latter in states of earlier versions
        if saved != self.periods:
            raise ValueError(f"periods must be {self.periods}, the saved ones are {saved}")
        if lacking := {"updates", "last_update"} - state.keys():
            raise ValueError(f"state of a scheduler must have {min(lacking)!r}, got {sorted(state)}")
        self.updates = dict(state["updates"])
        self.last_update = dict(state["last_update"])
