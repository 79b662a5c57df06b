"""What `nl reproduce` left in a folder: its table, its picture and its runs, finished or not."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nested_learning.lock import LOCK, in_use
from nested_learning.log_lines import Row, read_log

RUNS, TABLE, NUMBERS, PICTURE = "runs.jsonl", "results.md", "results.json", "results.png"
CELLS = re.compile(r"(?<!\\)\|")  # a bar inside a cell is escaped


@dataclass(frozen=True, kw_only=True, slots=True)
class ExperimentRecord:
    """An experiment as its folder shows it.

    Args:
        path: the folder.
        title: of its table, or the name of the folder before there is one.
        notes: what stands above the table.
        header, rows: the table; empty before all runs are finished.
        picture: its own picture as PNG, if it draws one.
        runs: rows of `runs.jsonl`: "task", "settings" and "result".
        running: whether a process adds runs.
        missing: what was looked for and not found, a sentence each.
    """

    path: Path
    title: str
    notes: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    picture: bytes | None
    runs: Sequence[Row]
    running: bool
    missing: Sequence[str]


def collect_experiment(path: Path) -> ExperimentRecord:
    """Read the folder `path` of an experiment. What it lacks is named in `missing`."""
    runs, whole = read_log(path / RUNS, lambda row: row.keys() >= {"task", "settings", "result"})
    missing = [] if runs else [f"{RUNS}: no finished run"]
    if not whole:
        missing.append(f"{RUNS}: a damaged or unfinished line is left out")
    title, notes = path.name, ""
    header: list[str] = []
    rows: list[list[str]] = []
    if (path / TABLE).is_file():
        title, notes, header, rows = parse_table((path / TABLE).read_text(encoding="utf-8"))
    else:
        missing.append(f"{TABLE}: not there; the table is made when all runs are finished")
    picture = path / PICTURE
    if not picture.is_file():
        missing.append(f"{PICTURE}: not there; some experiments draw no picture")
    return ExperimentRecord(
        path=path,
        title=title or path.name,
        notes=notes,
        header=header,
        rows=rows,
        picture=picture.read_bytes() if picture.is_file() else None,
        runs=runs,
        running=in_use(path / (RUNS + LOCK)),
        missing=missing,
    )


def parse_table(text: str) -> tuple[str, str, list[str], list[list[str]]]:
    """Title, notes, header and rows of a `results.md`, as `reproduce.report.Report.markdown` writes it."""
    title, notes, table = "", [], []
    for line in text.splitlines():
        if line.startswith("# ") and not title:
            title = line[2:]
        elif line.startswith("|"):
            table.append([cell.strip().replace("\\|", "|") for cell in CELLS.split(line)[1:-1]])
        elif line.strip():
            notes.append(line)
    if len(table) < 2:
        return title, "\n".join(notes), [], []
    return title, "\n".join(notes), table[0], table[2:]


def settings_that_differ(runs: Sequence[Row]) -> list[dict[str, str]]:
    """For every run, the settings in which it differs from another run: dotted name → value as text."""
    flat = [_flat(run["settings"]) for run in runs]
    names = dict.fromkeys(name for settings in flat for name in settings)
    varied = [name for name in names if len({settings.get(name, "") for settings in flat}) > 1]
    return [{name: settings[name] for name in varied if name in settings} for settings in flat]


def numbers_of(run: Row) -> dict[str, float]:
    """The results of a run that are single numbers, in their order."""
    result = run["result"]
    if not isinstance(result, dict):
        return {}
    return {
        name: value
        for name, value in result.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def curve_of(run: Row) -> list[tuple[float, float]]:
    """The evaluations of a run, as (step, value); empty if it has none. Those that are not finite are left
    out."""
    curve = run["result"].get("curve") if isinstance(run["result"], dict) else None
    if not isinstance(curve, list) or not all(isinstance(p, list) and len(p) == 2 for p in curve):
        return []
    return [(x, y) for x, y in curve if isinstance(y, int | float)]


def _flat(values: Any, where: str = "") -> dict[str, str]:
    if isinstance(values, Mapping):
        found: dict[str, str] = {}
        for key, value in values.items():
            found |= _flat(value, f"{where}.{key}" if where else str(key))
        return found
    return {where: values if isinstance(values, str) else json.dumps(values)}
