"""The tables and the picture of the benchmark on a card. They are made from the record alone."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nested_learning.bench.forecast import AGAIN, DENSE_SHARE, GAP, H100, PER_CHUNK, SMALL_SHARE
from nested_learning.bench.gpu_kernels import distrust
from nested_learning.bench.gpu_record import Entry, Record
from nested_learning.bench.gpu_speed import RATE
from nested_learning.report import markdown_table, new_figure

TITLES = {
    "train": "Training step (forward pass, loss, backward pass)",
    "forward": "Forward pass",
    "decode": "Decoding, one token at a time, one sequence",
}
NONE = "—"


def write_report(record: Record, folder: Path) -> str:
    """Write `gpu.md` and `gpu.png` into the folder; returns the Markdown."""
    text = markdown(record)
    (folder / "gpu.md").write_text(text)
    plot(record, folder / "gpu.png")
    return text


def markdown(record: Record) -> str:
    """Everything that the record holds."""
    machine = record.about["machine"]
    lines = [", ".join(f"{key} {value}" for key, value in machine.items()) + "."]
    if not record.about["settings"]["device"].startswith("cuda"):
        lines += ["", "**Made without a card: the times say that the benchmark works and nothing else.**"]
    if rate := record.done(RATE):
        lines += ["", f"bf16 product of side {rate['side']:,}: {rate['flops'] / 1e12:.4g} TFLOP/s."]
    for title, text in (
        ("Kernels against their token loops", _kernels(record)),
        *((title, _speeds(record, part)) for part, title in TITLES.items()),
        ("Training side by side", _pilots(record)),
        ("Kernels of a step, counted on the CPU", _counts(record)),
        ("Forecast for a card, not measured", _forecasts(record)),
    ):
        if text:
            lines += ["", f"## {title}", "", text.rstrip()]
    return "\n".join(lines) + "\n"


def told(entry: Entry, record: Record) -> str | None:
    """Why the figures of a measurement are not shown, or None if they are."""
    if entry["status"] != "done":
        return str(entry["why"])
    return distrust(entry["name"], record) if entry["kernels"] == "triton" else None


def _kernels(record: Record) -> str:
    rows = []
    for key, entry in record.entries.items():
        if key.startswith("kernel "):
            found = entry.get("differences", {})
            worst = max(found, key=found.__getitem__, default=None)
            shown = NONE if worst is None else f"{worst} {found[worst]:.2g}"
            right = "right" if entry["status"] == "done" else f"RED: {entry['why']}"
            limit = f"{entry['tolerance']:.0e}" if "tolerance" in entry else NONE
            rows.append([entry["kernel"], key.split()[-1], shown, limit, right])
    header = ["kernel", "inputs", "largest relative difference", "allowed", "verdict"]
    return markdown_table(header, rows) if rows else ""


def _speeds(record: Record, part: str) -> str:
    rows = [
        _speed_row(entry, told(entry, record), record)
        for entry in sorted(record.of(part), key=lambda entry: int(entry["length"]))
    ]
    header = ["position" if part == "decode" else "T", "batch", "model", "how", "tokens/s"]
    header += ["× Transformer (min / median / max)", "ms", "% of the bf16 rate", "peak MB"]
    header += ["kernels", "starts", "remark"]
    return markdown_table(header, rows) if rows else ""


def _speed_row(entry: Entry, hidden: str | None, record: Record) -> list[str]:
    who = [f"{entry['length']:,}", str(entry["batch"]), entry["name"], entry["how"]]
    if hidden is not None:
        return [*who, *[NONE] * 7, hidden]
    seconds, ratio = statistics.median(entry["seconds"]), entry["ratio"]
    per_token = seconds / entry["tokens"] if entry["part"] == "decode" else seconds
    rate = record.done(RATE)
    share = entry["flops"] / seconds / rate["flops"] if entry["flops"] and rate else None
    return [
        *who,
        f"{entry['tokens'] / seconds:.0f}",
        " / ".join(f"{ratio[key]:.2f}" for key in ("min", "median", "max")),
        f"{1e3 * per_token:.3g}",
        NONE if share is None else f"{100 * share:.1f}",
        NONE if entry["peak_bytes"] is None else f"{entry['peak_bytes'] / 1e6:.0f}",
        *(f"{entry[key]:,.0f}" if key in entry else NONE for key in ("kernels_per_step", "starts_per_step")),
        "",
    ]


def _pilots(record: Record) -> str:
    rows = []
    for key, entry in record.entries.items():
        if not key.startswith("pilot "):
            continue
        name = key.partition(" ")[2]
        if entry["status"] != "done":
            rows.append([name, NONE, NONE, NONE, NONE, NONE, entry["why"]])
        elif name != "plan":
            last = [row for row in entry["curve"] if "loss" in row][-1]
            rate = f"{last['tokens'] / last['seconds']:.0f}"
            losses = [_loss(last["loss"]), _loss(entry["valid_loss"])]
            rows.append([name, f"{entry['steps']:,}", f"{last['tokens']:,.0f}", rate, *losses, entry["text"]])
    header = ["model", "steps", "tokens", "tokens/s", "training loss", "held out", "text, or remark"]
    return markdown_table(header, rows) if rows else ""


def _loss(value: float | None) -> str:
    return NONE if value is None else f"{value:.4f}"


def _counts(record: Record) -> str:
    rows = []
    for entry in (entry for entry in record.of("count") if entry["status"] == "done"):
        keys = ("length", "layers", "forward", "backward", "total", "decoded")
        numbers = [NONE if entry[key] is None else f"{entry[key]:,}" for key in keys]
        stored = NONE if entry["stored"] is None else f"{entry['stored'] / 1e6:,.0f}"
        rows.append([entry["name"], entry["how"], *numbers, stored])
    header = ["model", "kernels", "T", "layers", "forward", "backward", "step", "one decoded token"]
    header.append("MB stored for the backward pass of a sequence")
    return markdown_table(header, rows) if rows else ""


def _forecasts(record: Record) -> str:
    rows = []
    for entry in record.of("forecast"):
        parts = [f"{1e3 * entry[key]:.3g}" for key in ("dense", "memories", "state", "starts", "total")]
        who = [entry["part"], f"{entry['length']:,}", str(entry["batch"]), entry["name"], entry["how"]]
        rows.append([*who, *parts, f"{entry['ratio']:.2f}"])
    if not rows:
        return ""
    header = [
        "",
        "T or position",
        "batch",
        "model",
        "products",
        "ms: dense",
        "memories",
        "state",
        "starts",
        "sum",
    ]
    assumed = (
        f"By counted operations and bytes on an {H100.name} ({H100.source}). Assumed: {DENSE_SHARE:.0%} of "
        f"the bf16 rate for large products and attention, {SMALL_SHARE:.0%} of a multiprocessor's tf32 rate "
        f"for products inside kernels, {1e6 * GAP:.0f} µs between kernels, {PER_CHUNK} kernels per chunk and "
        f"layer in training, {AGAIN} forward pass run again. Starts in decoding are the gaps between the "
        "kernels of PyTorch's own path, counted above, in one graph."
    )
    return assumed + "\n\n" + markdown_table([*header, "× Transformer"], rows)


def plot(record: Record, path: Path) -> None:
    """Tokens per second of training, peak memory and time of a decoded token, of each model at its best."""
    figure = new_figure(14, 4)
    speed, memory, decode = figure.subplots(1, 3)
    _curves(speed, record, "train", lambda e: e["tokens"] / statistics.median(e["seconds"]))
    _curves(memory, record, "train", lambda e: e["peak_bytes"] / 1e6)
    _curves(decode, record, "decode", lambda e: 1e3 * statistics.median(e["seconds"]) / e["tokens"])
    speed.set(title="Training step", xlabel="T (tokens)", ylabel="tokens per second")
    memory.set(title="Peak memory of a training step", xlabel="T (tokens)", ylabel="MB")
    decode.set(title="Decoding", xlabel="position", ylabel="ms per token")
    figure.savefig(path, dpi=120)


def _curves(axes: Any, record: Record, part: str, value: Any) -> None:
    """One line per model and way, both axes logarithmic."""
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    shown: Sequence[Entry] = [e for e in record.of(part) if told(e, record) is None]
    for who in dict.fromkeys((e["name"], e["how"]) for e in shown):
        points = sorted((e["length"], value(e)) for e in shown if (e["name"], e["how"]) == who)
        axes.plot(*zip(*points, strict=True), "o-", label=f"{who[0]} ({who[1]})", markersize=4)
    if shown:
        axes.legend(fontsize=7)
