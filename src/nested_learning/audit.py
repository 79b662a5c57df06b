"""`nl audit`: which level updates when, by the plan and in a real training step.

The plan is `levels.calendar`. What happened is counted where it happens: fast levels count their writes and
resets in the state that the forward pass hands back, slow levels are counted by the optimizer.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.optim import Optimizer

from nested_learning.config import load_config
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
from nested_learning.train.objective import next_token_loss
from nested_learning.train.trainer import slow_levels

LARGE = 5_000_000  # parameters from which on a model is audited with its width and depth reduced
COLOURS = {"update": "C0", "reset": "C3", "step": "C2"}


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
    """

    title: str
    config: RunConfig
    model: HopeConfig
    steps: int
    rows: int
    checks: list[Check]
    events: list[Event]
    bills: list[Bill]

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
    state, optimizer = train_steps(replace(config, model=model_config), steps, rows)
    checks = [
        *fast_checks(model_config, config.train.seq_len, state),
        *slow_checks(slow, tokens, optimizer),
    ]
    events = replace(config.model, seq_len=config.train.seq_len).calendar(tokens)
    bills = fast_weight_bill(config.model)
    return Audit(title or config.name, config, model_config, steps, rows, checks, events, bills)


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


def train_steps(config: RunConfig, steps: int, rows: int) -> tuple[ModelState, Optimizer]:
    """Ordinary training steps on random tokens: the state after the last one, and the optimizer."""
    set_seed(config.seed)
    model = HopeLM(config.model)
    optimizer = build_optimizer(config.optim, model, slow=slow_levels(config.model, model))
    generator = torch.Generator().manual_seed(config.seed)
    for _ in range(steps):
        shape = (rows, config.train.seq_len + 1)
        tokens = torch.randint(config.model.vocab_size, shape, generator=generator)
        optimizer.zero_grad(set_to_none=True)
        logits, state = model(tokens[:, :-1])
        next_token_loss(logits, tokens[:, 1:]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return state, optimizer


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


def describe(result: Audit) -> str:
    """Calendar, counts and bill as text."""
    model, length = result.config.model, result.config.train.seq_len
    lines = [
        f"{result.title}: mixer {model.mixer}, {model.num_layers} blocks, CMS {model.cms_variant}, "
        f"sequences of {length} tokens",
        *(_describe_level(result, level) for level in model.levels),
    ]
    size = "the whole model"
    if result.model != model:
        size = f"reduced to width {result.model.dim} and {result.model.num_layers} blocks"
    lines.append(f"  {result.steps} training step(s) of {result.rows} x {length} tokens, {size}:")
    for check in result.checks:
        counts = "found {} updates, {} resets; planned {}, {}".format(*check.found, *check.planned)
        lines.append(f"    {'ok  ' if check.ok else 'FAIL'} {check.where}, {check.level}: {counts}")
    if not result.checks:
        lines.append("    ok   no level has a period")
    return "\n".join([*lines, *_describe_bill(result.bills)])


def _describe_level(result: Audit, level: LevelSpec) -> str:
    kind = result.config.model.level_kind(level)
    blocks = "all blocks" if level.layers is None else f"blocks {', '.join(map(str, level.layers))}"
    parts = []
    for name in ("update", "reset", "step"):
        times = [str(e.token) for e in result.events if e.level == level.name and e.kind == name]
        if times:
            shown = times if len(times) <= 6 else [*times[:3], "…", times[-1]]
            parts.append(f"{name} after {', '.join(shown)} ({len(times)})")
    return f"  {level.name}: {kind}, {blocks}; " + "; ".join(parts)


def _describe_bill(bills: Sequence[Bill]) -> list[str]:
    lines = ["  floats per sequence:"]
    start = 0
    for i, bill in enumerate(bills):
        if i + 1 == len(bills) or bills[i + 1] != bill:
            blocks = f"block {start}" if start == i else f"blocks {start}-{i}, each"
            levels = "".join(f", {name} {floats:,}" for name, floats in bill.levels.items())
            lines.append(f"    {blocks}: mixer {bill.mixer:,}{levels}")
            start = i + 1
    total = sum(bill.total for bill in bills)
    lines.append(f"    together {total:,} ({total * 4 / 2**20:.1f} MiB in float32)")
    return lines


def draw(result: Audit, path: Path) -> None:
    """The calendar as a PNG: a row per level, a mark per event."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    levels = [level.name for level in result.config.model.levels]
    figure = Figure(figsize=(9, 1.2 + 0.5 * len(levels)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for kind, colour in COLOURS.items():
        marked = [(e.token, levels.index(e.level)) for e in result.events if e.kind == kind]
        if marked:
            xs, ys = zip(*marked, strict=True)
            axes.scatter(xs, ys, marker="|", s=160, color=colour, label=kind)
    axes.set_yticks(range(len(levels)), levels)
    axes.set(xlabel="tokens", title=f"{result.title}: updates of the levels", ylim=(-0.6, len(levels) - 0.4))
    axes.set_xlim(left=0)
    axes.invert_yaxis()
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def shipped() -> list[tuple[str, str, list[str]]]:
    """Every entry of `configs/`, and every experiment on top of `pilot_smoke`: (title, name, overrides)."""
    folders = (Path("configs"), Path(__file__).resolve().parents[2] / "configs")
    root = next((folder for folder in folders if (folder / "base.yaml").is_file()), None)
    if root is None:
        raise FileNotFoundError("no folder configs/ here; run the command in the repository")
    files = [file for file in sorted(root.glob("*.yaml")) if file.stem != "base"]
    names = [file.stem for file in files if "defaults:" in file.read_text(encoding="utf-8")]  # of a run
    experiments = [file.stem for file in sorted(root.glob("experiment/*.yaml"))]
    on_top = [(f"experiment={name}", "pilot_smoke", [f"experiment={name}"]) for name in experiments]
    return [(name, name, []) for name in names] + on_top


def add_to(parser: argparse.ArgumentParser) -> None:
    """Options of `nl audit`."""
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--config-name", help="an entry of configs/, or a YAML file")
    which.add_argument("--all", action="store_true", help="every entry and every experiment of configs/")
    parser.add_argument("overrides", nargs="*", help="such as experiment=cms_slow or train.seq_len=1024")
    help_text = "folder for the pictures (default: outputs/audit)"
    parser.add_argument("--output", type=Path, default=Path("outputs/audit"), help=help_text)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Audit what `options` name; 1 if a level did not do what the plan says."""
    named = " ".join([options.config_name or "", *options.overrides])
    jobs = shipped() if options.all else [(named, options.config_name, [])]
    failed = []
    for title, name, overrides in jobs:
        result = audit(load_config(name, [*overrides, *options.overrides]), title)
        path = options.output / (re.sub(r"[^\w.]+", "-", title).strip("-") + ".png")
        draw(result, path)
        print(f"{describe(result)}\n  calendar drawn in {path}\n")
        failed += [] if result.ok else [title]
    print(f"failed: {', '.join(failed)}" if failed else f"{len(jobs)} of {len(jobs)} as planned")
    sys.stdout.flush()
    return 1 if failed else 0
