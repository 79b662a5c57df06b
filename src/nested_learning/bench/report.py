"""What a benchmark run leaves behind: JSON, a Markdown table and a picture."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nested_learning.report import markdown_table, new_figure

Row = dict[str, Any]
Column = tuple[str, Callable[[Row], str]]

TITLES = {
    "train": "Training step",
    "forward": "Forward pass",
    "decode": "Decoding, one token at a time",
    "memory": "Peak memory of a training step",
}


def write_report(report: dict[str, Any], output: Path) -> str:
    """Write `speed.json`, `speed.md` and `speed.png` into the folder `output`; returns the Markdown."""
    output.mkdir(parents=True, exist_ok=True)
    (output / "speed.json").write_text(json.dumps(report, indent=1) + "\n")
    text = markdown(report)
    (output / "speed.md").write_text(text)
    plot(report["results"], output / "speed.png")
    return text


def markdown(report: dict[str, Any]) -> str:
    """One table per part that was run, under a line each about the machine and its rates."""
    rates, machine = report["rates"], report["machine"]
    settings = report["settings"]
    lines = [
        ", ".join(f"{key} {value}" for key, value in machine.items()) + ".",
        "",
        f"Width {settings['dim']}, {settings['layers']} layers, {settings['heads']} heads, "
        f"{settings['precision']}{', compiled' if settings['compile'] else ''}, "
        f"{settings['repeats']} rounds. "
        f"Measured rates: large product {rates['large'] / 1e9:.1f} GFLOP/s, "
        f"batched 64 × 64 × 64 {rates['batched'] / 1e9:.1f} GFLOP/s, copy {rates['copy'] / 1e9:.1f} GB/s.",
    ]
    for part, title in TITLES.items():
        rows = [row for row in report["results"] if row["part"] == part]
        if rows:
            lines += ["", f"## {title}", "", _table(rows, _columns(part)).rstrip()]
    return "\n".join(lines) + "\n"


def _columns(part: str) -> list[Column]:
    if part == "memory":
        return [
            *_who("T"),
            ("peak MB", lambda row: f"{row['peak_bytes'] / 1e6:.1f}"),
            ("× yardstick's", lambda row: f"{row['ratio']['median']:.2f}"),
        ]
    speed: list[Column] = [
        ("tokens/s", lambda row: f"{row['tokens_per_second']['median']:.0f}"),
        ("× yardstick's speed (min / median / max)", lambda row: _spread(row["ratio"])),
        ("ms", lambda row: f"{1e3 * statistics.median(row['seconds']):.3g}"),
    ]
    size: list[Column] = [
        ("parameters", lambda row: _number(row["parameters"])),
        ("state floats", lambda row: _number(row["state_floats"])),
    ]
    if part == "decode":
        more: list[Column] = [
            ("× own time at the first position", lambda row: _spread(row["growth"])),
            ("floor ms: copy", lambda row: f"{1e3 * row['floor']['copy']:.3g}"),
        ]
        return [*_who("position"), *speed, *more, *size]
    counted: list[Column] = [
        ("floor ms: large / mixed / copy", _floor),
        ("MFLOP/token", lambda row: _number(row["flops_per_token"], 1e6, 2)),
    ]
    return [*_who("T"), *speed, *counted, *size]


def _who(length: str) -> list[Column]:
    return [
        (length, lambda row: f"{row['length']:,}"),
        ("batch", lambda row: str(row["batch"])),
        ("model", lambda row: row["name"]),
        ("yardstick", lambda row: row["yardstick"]),
    ]


def _table(rows: Sequence[Row], columns: Sequence[Column]) -> str:
    return markdown_table([name for name, _ in columns], [[cell(row) for _, cell in columns] for row in rows])


def _spread(value: Row | None) -> str:
    if value is None:
        return "—"
    return f"{value['min']:.2f} / {value['median']:.2f} / {value['max']:.2f}"


def _floor(row: Row) -> str:
    floor = row["floor"]
    return (
        "—" if floor is None else " / ".join(f"{1e3 * floor[key]:.3g}" for key in ("large", "mixed", "copy"))
    )


def _number(value: float | None, unit: float = 1, digits: int = 0) -> str:
    return "—" if value is None else f"{value / unit:,.{digits}f}"


def plot(results: Sequence[Row], path: Path) -> None:
    """Tokens/s of the training step, and its peak memory per sequence, over T, as a PNG."""
    figure = new_figure(10, 4)
    speed, memory = figure.subplots(1, 2)
    _curves(speed, results, "train", lambda row: row["tokens_per_second"]["median"])
    _curves(memory, results, "memory", lambda row: row["peak_bytes"] / row["batch"] / 1e6)
    speed.set(title="Training step", xlabel="T (tokens)", ylabel="tokens per second")
    memory.set(title="Peak memory of a training step", xlabel="T (tokens)", ylabel="MB per sequence")
    figure.savefig(path, dpi=120)


def _curves(axes: Any, results: Sequence[Row], part: str, value: Callable[[Row], float]) -> None:
    """One line per model, both axes logarithmic."""
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    rows = [row for row in results if row["part"] == part]
    for name in dict.fromkeys(row["name"] for row in rows):
        points = sorted((row["length"], value(row)) for row in rows if row["name"] == name)
        axes.plot([x for x, _ in points], [y for _, y in points], "o-", label=name, markersize=4)
    if rows:
        axes.legend()
