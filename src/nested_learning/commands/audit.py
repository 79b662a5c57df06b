"""Which level updates when, by plan and in a real training step.

uv run nl audit --config-name pilot_smoke experiment=cms_nested
uv run nl audit --all

Prints the calendar of every level, the updates counted in a training step, what each level does (how far it
moves, and the loss without that) and the size of the fast weights, and draws the calendar.
Exit status 1 if a level did not do what the calendar says.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from nested_learning.command import Parser
from nested_learning.config import load_config
from nested_learning.home import config_folder
from nested_learning.levels import LevelSpec
from nested_learning.models.bill import Bill
from nested_learning.train.audit import Audit, audit
from nested_learning.train.plots import calendar_figure


def parser() -> Parser:
    """The options of `nl audit`."""
    made = Parser(description=__doc__)
    which = made.add_mutually_exclusive_group(required=True)
    which.add_argument("--config-name", help="an entry of configs/, or a YAML file")
    which.add_argument("--all", action="store_true", help="every entry and every experiment of configs/")
    made.add_argument("overrides", nargs="*", help="such as experiment=cms_slow or train.seq_len=1024")
    help_text = "folder for the pictures (default: %(default)s)"
    made.add_argument("--output", type=Path, default=Path("outputs/audit"), help=help_text)
    return made


def main() -> int:
    """Audit the named configurations and return 1 if a level did not do what the calendar says."""
    options = parser().parse_args()
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


def shipped() -> list[tuple[str, str, list[str]]]:
    """Every entry of `configs/`, and every experiment on top of `pilot_smoke`: (title, name, overrides)."""
    folders = (Path("configs"), config_folder())
    root = next((folder for folder in folders if (folder / "base.yaml").is_file()), None)
    if root is None:
        raise FileNotFoundError("no folder configs/ here; run the command in the repository")
    files = [file for file in sorted(root.glob("*.yaml")) if file.stem != "base"]
    names = [file.stem for file in files if "defaults:" in file.read_text(encoding="utf-8")]  # of a run
    experiments = [file.stem for file in sorted(root.glob("experiment/*.yaml"))]
    on_top = [(f"experiment={name}", "pilot_smoke", [f"experiment={name}"]) for name in experiments]
    return [(name, name, []) for name in names] + on_top


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
    lines.append("  what the levels do then, on other random tokens:")
    lines += [f"    {effect.describe()}" for effect in result.effects]
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
    levels = [level.name for level in result.config.model.levels]
    figure = calendar_figure(levels, result.events, f"{result.title}: updates of the levels")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
