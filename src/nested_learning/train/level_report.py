"""What every level does: how far it moves, and what the loss is without that.

A fast level moves within a sequence, from its initial weights to those after the last write. It is frozen by
never writing it. The parameters of a slow or plain level move in training. They are frozen by putting them
back to where they were when the watch began.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nested_learning.layers.cms import CMS, FastLevel, FastLevelState
from nested_learning.levels import LevelKind
from nested_learning.models.lm import HopeLM
from nested_learning.state import ModelState
from nested_learning.train.config import RunConfig
from nested_learning.train.strategy import Strategy

CHANGE_FLOOR = 1e-6
"""Relative change below which a level has not moved: ten roundings of float32."""
LOSS_FLOOR = 1e-5
"""Difference of losses, in nats per token, below which it is the rounding of float32 (about 1e-6) at most."""


@dataclass(frozen=True, slots=True)
class LevelEffect:
    """What one level does, over all blocks that have it.

    Args:
        level, kind: its name, and who updates it.
        change: norm of its change over the norm of what it started from.
        loss: with all levels as they are, nats per token.
        frozen: loss of the same rows with this level frozen.
    """

    level: str
    kind: LevelKind
    change: float
    loss: float
    frozen: float

    @property
    def idle(self) -> str | None:
        """Why the level does nothing, or None if it does something."""
        if self.change < CHANGE_FLOOR:
            where = "within a sequence" if self.kind == "fast" else "in training"
            return f"it changes by {self.change:.1e} of its norm {where}"
        if abs(self.frozen - self.loss) < LOSS_FLOOR:
            return f"without its changes the loss is {self.frozen - self.loss:+.1e} nats per token"
        return None

    def describe(self) -> str:
        """One line: change, and how much the loss rises with the level frozen; or that it does nothing."""
        if self.idle is not None:
            return f"level {self.level} does nothing: {self.idle}"
        frozen = f"frozen {self.frozen:.4f} ({self.frozen - self.loss:+.5f} nats per token)"
        return f"level {self.level} ({self.kind}): change {self.change:.2e}, loss {self.loss:.4f}, {frozen}"

    def record(self) -> dict[str, float]:
        """The numbers under names of their own, for a log."""
        start = f"level/{self.level}/"
        return {f"{start}change": self.change, f"{start}frozen_loss_rise": self.frozen - self.loss}


class LevelWatch:
    """Remembers where the parameters of slow and plain levels begin, and measures what each level does.

    Args:
        model: its parameters are whole on this device (not sharded). What it starts from is kept on the CPU.
    """

    def __init__(self, model: HopeLM) -> None:
        self.model = model
        self.start = {
            name: [parameter.detach().to("cpu", copy=True) for parameter in parameters]
            for name, parameters in level_parameters(model).items()
        }

    @torch.no_grad()
    def measure(
        self,
        tokens: Tensor,
        loss: Callable[[], float],
        add: Callable[[Tensor], Tensor] = lambda value: value,
    ) -> list[LevelEffect]:
        """What each level of the model does, in the order of the configuration.

        Args:
            tokens: rows `[B, T]` on the device of the model, over which the changes of fast levels are taken.
            loss: the loss of the model as it is at the call, the same rows at every call.
            add: sums a tensor over ranks with rows of their own.
        """
        config, whole = self.model.config, loss()
        moved = {**fast_changes(self.model, tokens), **self._changes()}
        effects = []
        for spec in config.levels:
            with self.frozen(spec.name):
                frozen = loss()
            squares = add(moved[spec.name])  # of one rank and of another: the ratio of the sums
            change = math.sqrt(float(squares[0] / squares[1])) if squares[1] else 0.0
            effects.append(LevelEffect(spec.name, config.level_kind(spec), change, whole, frozen))
        return effects

    @contextmanager
    def frozen(self, name: str) -> Iterator[None]:
        """The model with level `name` frozen inside, as before outside."""
        if name in self.start:
            with self._put_back(name):
                yield
        else:
            with never_written(self.model, name):
                yield

    @contextmanager
    def _put_back(self, name: str) -> Iterator[None]:
        parameters = level_parameters(self.model)[name]
        now = [parameter.detach().clone() for parameter in parameters]
        _assign(parameters, self.start[name])
        try:
            yield
        finally:
            _assign(parameters, now)

    def _changes(self) -> dict[str, Tensor]:
        """Squared norms `[2]` of change and start of every slow or plain level."""
        return {
            name: _squares(parameters, self.start[name])
            for name, parameters in level_parameters(self.model).items()
        }


def why_no_report(config: RunConfig, model: nn.Module, strategy: Strategy) -> str | None:
    """Why a run does not report what its levels do; None if it does, "" if nobody would expect it."""
    if not config.train.level_report or not isinstance(model, HopeLM):
        return ""
    if all(config.model.level_kind(level) == "plain" for level in config.model.levels):
        return ""  # an ordinary MLP is always written
    if strategy.shards_parameters:
        return f"{strategy.name} keeps only parts of the parameters on a rank"
    if config.train.inner == "online":
        return "with train.inner = online all weights of a sequence are written by its loss too"
    return None


def level_parameters(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Parameters of every slow or plain level over all blocks, the norms before it included."""
    found: dict[str, list[nn.Parameter]] = {}
    for cms in _systems(model):
        for spec, kind, norm, level in zip(cms.specs, cms.kinds, cms.norms, cms.levels, strict=True):
            if kind != "fast":
                found.setdefault(spec.name, []).extend([*norm.parameters(), *level.parameters()])
    return found


@contextmanager
def never_written(model: nn.Module, name: str) -> Iterator[None]:
    """The fast level `name` answers with its initial weights inside, in all blocks.

    At the end of every chunk it is put back to them instead of being written.
    """
    levels = [
        level
        for cms in _systems(model)
        for spec, level in zip(cms.specs, cms.levels, strict=True)
        if spec.name == name and isinstance(level, FastLevel)
    ]
    before = [(level.reset_every, level.compiled) for level in levels]
    for level in levels:
        level.reset_every, level.compiled = level.chunk_size, False  # nothing is compiled for a few rows
    try:
        yield
    finally:
        for level, (reset_every, compiled) in zip(levels, before, strict=True):
            level.reset_every, level.compiled = reset_every, compiled


def fast_changes(model: HopeLM, tokens: Tensor) -> dict[str, Tensor]:
    """Squared norms `[2]` of change and initial weights of every fast level over `tokens [B, T]`.

    Taken after the last write that is not followed by a reset right there: in a nested system a level may go
    back at the very end of the sequence.
    """
    ends: dict[int, list[str]] = {}
    for name, end in _last_writes(model, tokens.shape[1]).items():
        ends.setdefault(end, []).append(name)
    found = {}
    start = model.init_state(tokens.shape[0])
    for end, names in ends.items():
        after = model(tokens[:, :end])[1]
        for name in names:
            now, before = _fast_weights(model, after, name), _fast_weights(model, start, name)
            found[name] = _squares(now, before)
    return found


def _last_writes(model: HopeLM, length: int) -> dict[str, int]:
    """Token after which each fast level is written last; `length` for one that never is."""
    config = model.config
    fast = [spec.name for spec in config.levels if config.level_kind(spec) == "fast"]
    last = dict.fromkeys(fast, length)
    for event in config.calendar(length):
        if event.kind == "update" and event.level in last:
            last[event.level] = event.token
    return last


def _fast_weights(model: HopeLM, state: ModelState, name: str) -> list[Tensor]:
    found: list[Tensor] = []
    for number, layer in enumerate(state.layers):
        for spec, level in zip(model.config.levels_of(number), layer.memory.levels, strict=True):
            if spec.name == name and isinstance(level, FastLevelState):
                found += [level.memory.w2, *level.memory.w1]
    return found


def _squares(now: Sequence[Tensor], start: Sequence[Tensor]) -> Tensor:
    moved = sum(
        (a.double() - b.to(a.device).double()).square().sum() for a, b in zip(now, start, strict=True)
    )
    norm = sum(b.double().square().sum() for b in start)
    assert isinstance(moved, Tensor) and isinstance(norm, Tensor)
    return torch.stack([moved, norm.to(moved.device)]).detach()


def _assign(parameters: list[nn.Parameter], values: list[Tensor]) -> None:
    with torch.no_grad():
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value)


def _systems(model: nn.Module) -> list[CMS]:
    return [module for module in model.modules() if isinstance(module, CMS)]
