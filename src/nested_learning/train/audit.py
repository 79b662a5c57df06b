"""Which level updates when: the calendar of a configuration compared with real training steps.

The plan is `levels.calendar`. The counts are taken where the updates happen: fast levels count their writes
and resets in the state that the forward pass returns, and the optimizer counts the updates of slow levels.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch.optim import Optimizer

from nested_learning.layers.cms import FastLevelState
from nested_learning.levels import Event, LevelSpec
from nested_learning.models.bill import Bill, count_parameters, fast_weight_bill
from nested_learning.models.config import HopeConfig
from nested_learning.models.lm import HopeLM
from nested_learning.optim.build import build_optimizer
from nested_learning.optim.multi_frequency import MultiFrequencyOptimizer
from nested_learning.runtime import set_seed
from nested_learning.state import ModelState
from nested_learning.train.config import RunConfig
from nested_learning.train.level_report import LevelEffect, LevelWatch
from nested_learning.train.objective import next_token_loss
from nested_learning.train.trainer import slow_levels

LARGE = 5_000_000  # parameters from which on a model is audited with its width and depth reduced


@dataclass(frozen=True, slots=True)
class Check:
    """One count that was compared with the plan.

    `where` is a block or the optimizer; counts are (updates, resets).
    """

    where: str
    level: str
    period: int
    planned: tuple[int, int]
    found: tuple[int, int]

    @property
    def ok(self) -> bool:
        """Whether what happened is what was planned."""
        return self.planned == self.found


@dataclass(frozen=True, slots=True)
class Audit:
    """A configuration's calendar, bill and counts.

    Args:
        title: name of the configuration.
        config: the run as configured. `model` is the one that took the steps, perhaps a reduced one.
        steps, rows: training steps taken, and sequences in each.
        effects: what every level does after these steps, on rows that were not trained on.
    """

    title: str
    config: RunConfig
    model: HopeConfig
    steps: int
    rows: int
    checks: list[Check]
    events: list[Event]
    bills: list[Bill]
    effects: list[LevelEffect]

    @property
    def ok(self) -> bool:
        """Whether every count is as planned."""
        return all(check.ok for check in self.checks)


def audit(config: RunConfig, title: str | None = None) -> Audit:
    """Train as long as the slowest level needs, with random tokens, and compare the counts with the plan.

    One training step; with slow levels as many as the longest period has sequences. A model of more than
    5 M parameters is reduced in width and depth, with one sequence per step.
    """
    model_config, rows = reduced(config.model), 1
    if model_config == config.model:
        rows = config.train.batch_size // config.train.accumulation
    slow = [level for level in config.model.levels if config.model.level_kind(level) == "slow"]
    tokens = max([config.train.seq_len, *(level.chunk_size or 0 for level in slow)])
    steps = tokens // config.train.seq_len
    state, optimizer, effects = train_steps(replace(config, model=model_config), steps, rows)
    checks = [
        *fast_checks(model_config, config.train.seq_len, state),
        *slow_checks(slow, tokens, optimizer),
    ]
    events = replace(config.model, seq_len=config.train.seq_len).calendar(tokens)
    bills = fast_weight_bill(config.model)
    return Audit(title or config.name, config, model_config, steps, rows, checks, events, bills, effects)


def reduced(config: HopeConfig) -> HopeConfig:
    """`config` itself, or a narrow and shallow model with the same levels, periods and mixer if it is large.

    As many blocks stay as the levels name.
    """
    if count_parameters(config) < LARGE:
        return config
    named = [layer + 1 for level in config.levels for layer in level.layers or ()]
    hidden = None if config.memory.hidden is None else min(config.memory.hidden, 8)
    return replace(
        config,
        vocab_size=64,
        dim=16,
        num_heads=2,
        num_layers=min(config.num_layers, max([2, *named])),
        memory=replace(config.memory, hidden=hidden),
    )


def train_steps(config: RunConfig, steps: int, rows: int) -> tuple[ModelState, Optimizer, list[LevelEffect]]:
    """Ordinary training steps on random tokens: the state after the last one, the optimizer, and what every
    level does on further rows."""
    set_seed(config.seed)
    model = HopeLM(config.model)
    optimizer = build_optimizer(config.optim, model, slow=slow_levels(config.model, model))
    generator = torch.Generator().manual_seed(config.seed)
    shape, watch = (rows, config.train.seq_len + 1), LevelWatch(model)
    for _ in range(steps):
        tokens = torch.randint(config.model.vocab_size, shape, generator=generator)
        optimizer.zero_grad(set_to_none=True)
        logits, state = model(tokens[:, :-1])
        next_token_loss(logits, tokens[:, 1:]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    held_out = torch.randint(config.model.vocab_size, shape, generator=generator)

    def loss() -> float:
        return float(next_token_loss(model(held_out[:, :-1])[0], held_out[:, 1:]))

    return state, optimizer, watch.measure(held_out[:, :-1], loss)


def fast_checks(config: HopeConfig, seq_len: int, state: ModelState) -> list[Check]:
    """What the fast levels of every block counted over one sequence, beside the plan."""
    checks = []
    for number, layer in enumerate(state.layers):
        events = config.calendar(seq_len, number)
        for spec, level in zip(config.levels_of(number), layer.memory.levels, strict=True):
            if not isinstance(level, FastLevelState) or spec.chunk_size is None:
                continue
            kinds = [event.kind for event in events if event.level == spec.name]
            planned = (kinds.count("update"), kinds.count("reset"))
            fires = seq_len // spec.chunk_size
            if sum(planned) != fires:
                raise AssertionError(f"the calendar of {spec.name} has {sum(planned)} events, not {fires}")
            found = (level.writes, level.resets)
            checks.append(Check(f"block {number}", spec.name, spec.chunk_size, planned, found))
    return checks


def slow_checks(levels: Iterable[LevelSpec], tokens: int, optimizer: Optimizer) -> list[Check]:
    """How often the optimizer updated the slow levels, beside ⌊T/P⌋."""
    statistics = optimizer.statistics() if isinstance(optimizer, MultiFrequencyOptimizer) else {}
    return [
        Check(
            "optimizer",
            level.name,
            level.chunk_size or 1,
            (tokens // (level.chunk_size or 1), 0),
            (statistics.get(level.name, {}).get("updates", 0), 0),
        )
        for level in levels
    ]
