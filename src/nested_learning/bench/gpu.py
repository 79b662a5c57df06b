"""The benchmark for one command on a card, in stages; every measurement is on disk as soon as it is made.

`scripts/bench/gpu.sh` runs it within some minutes, and run again it goes on. docs/performance.md says what
the numbers mean.
"""

from __future__ import annotations

from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import torch

from nested_learning.bench.counts import count_decoded, count_dispatches, count_stored
from nested_learning.bench.forecast import PRODUCTS, Forecast, decoding_forecast, training_forecast
from nested_learning.bench.gpu_kernels import check_kernels, modules_of
from nested_learning.bench.gpu_pilot import train_pilots
from nested_learning.bench.gpu_record import Budget, Entry, Record, code_fingerprint
from nested_learning.bench.gpu_report import write_report
from nested_learning.bench.gpu_settings import ARMS, PEERS, YARDSTICK, GpuSettings, model_config
from nested_learning.bench.gpu_speed import Speed
from nested_learning.bench.machine import describe
from nested_learning.bench.timing import Progress
from nested_learning.models.lm import HopeLM

STAGES = ("kernels", "speed", "pilot", "counts")
FILE = "gpu.json"
DECODED_TOGETHER = 16
"""Sequences of the second forecast of decoding."""
READ = 70
"""Tokens before the decoded one whose kernels are counted: one chunk is written, the next one unfinished."""


def run_gpu(
    settings: GpuSettings,
    folder: Path,
    stages: tuple[str, ...],
    minutes: float,
    pilot_minutes: float,
    progress: Progress,
) -> tuple[str, bool]:
    """Run stages into `folder`; gives the report, and whether nothing failed.

    Args:
        settings: what is measured.
        folder: for `gpu.json`, `gpu.md`, `gpu.png`, `pilot.png`, `profile.txt`, `trace.json.gz` and the two
            runs.
        stages: of `STAGES`; they run in that order.
        minutes: for all of them.
        pilot_minutes: of these, kept for the training runs.
        progress: told about every measurement.

    Raises:
        LostCardError: another process has to go on.
        ValueError: the folder holds results of other settings, another machine or other code.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if settings.on_card:
        torch.cuda.set_device(torch.device(settings.device).index or 0)
    record = Record(folder / FILE, about(settings))
    whole, before = Budget(60 * minutes), Budget(60 * max(0.0, minutes - pilot_minutes))
    try:
        for stage in (stage for stage in STAGES if stage in stages):
            if stage == "kernels":
                check_kernels(settings, record, before, progress)
            elif stage == "speed":
                Speed(settings, record, before, folder, progress).run()
            elif stage == "pilot":
                train_pilots(settings, record, whole, folder, progress)
            else:
                count_kernels(settings, record, whole, progress)
                forecast(settings, record)
    finally:
        text = write_report(record, folder)
    return text, all(entry["status"] != "failed" for entry in record.entries.values())


def about(settings: GpuSettings) -> dict[str, object]:
    """What results belong to: settings, machine and code."""
    machine = describe(settings.device)
    if settings.on_card:
        card = torch.cuda.get_device_properties(settings.device)
        machine["memory"] = f"{card.total_memory / 2**30:.0f} GiB"
        machine["capability"] = f"{card.major}.{card.minor}"
        machine["CUDA"] = str(torch.version.cuda)
    return {"settings": asdict(settings), "machine": machine, "code": code_fingerprint()}


def arms(settings: GpuSettings) -> list[str]:
    """The Transformer and those of our models that are measured."""
    return [YARDSTICK, *(name for name in settings.models if name not in PEERS and name != YARDSTICK)]


def count_kernels(settings: GpuSettings, record: Record, budget: Budget, progress: Progress) -> None:
    """Kernels of a training step and of a decoded token, counted on narrow models on the CPU."""
    for name in arms(settings):
        for how in ("torch", "triton") if modules_of(name) and find_spec("triton") else ("torch",):
            key = f"count {name} {how}"
            if record.has(key):
                continue
            if not budget.fits(0):
                record.put(key, "skipped", why="no time left")
                continue
            entry = count_model(settings, name, how)
            record.put(key, "done", name=name, how=how, **entry)
            progress(f"{key}: {entry['total']:,} kernels in a step")


def count_model(settings: GpuSettings, name: str, how: str) -> Entry:
    """The counts of one model, on PyTorch's own path ("torch") or with our kernels ("triton")."""
    length = settings.count_tokens
    config = model_config(settings, name, length, narrow=True)
    model = HopeLM(config)
    tokens = torch.zeros(2, length + 1, dtype=torch.int64)
    found = count_dispatches(model, tokens, triton=how == "triton")
    decoded = count_decoded(model, tokens[:1, :READ]) if how == "torch" else None
    about = {"length": length, "layers": config.num_layers, "total": found.total, "decoded": decoded}
    return {**about, **asdict(found), "stored": _stored(settings, name, how)}


def _stored(settings: GpuSettings, name: str, how: str) -> int | None:
    """Bytes that a model of full width stores for one sequence, on the path that it takes on a card."""
    if how == "torch" and modules_of(name):
        return None  # gigabytes, and most of the time
    tokens = torch.zeros(1, settings.count_tokens + 1, dtype=torch.int64)
    model = HopeLM(model_config(settings, name, settings.count_tokens))
    return count_stored(model, tokens, triton=how == "triton")


def forecast(settings: GpuSettings, record: Record) -> None:
    """Forecasts of training and decoding by what was counted; of models with ordinary levels only."""
    plain = [name for name in arms(settings) if "levels=mlp" in ARMS[name]]
    counts = {name: entry for name in plain if (entry := record.done(f"count {name} torch"))}
    if YARDSTICK not in counts:
        return
    configs = {name: model_config(settings, name, max(settings.lengths)) for name in counts}
    rest = {name: counts[YARDSTICK]["total"] for name in counts}
    if ours := record.done("count linear triton"):
        rest["linear"] = ours["total"]  # for any number of chunks
    for length in settings.lengths:
        batch = settings.batch(length)
        made = {
            (name, products): training_forecast(config, batch, length, rest[name], products)
            for name, config in configs.items()
            for products in (PRODUCTS if name != YARDSTICK else ("tf32",))
        }
        _keep(record, ("train", length, batch), made)
    for at in settings.positions:
        for batch in (1, DECODED_TOGETHER):
            decoded = {
                (name, "torch"): decoding_forecast(config, batch, at, counts[name]["decoded"])
                for name, config in configs.items()
            }
            _keep(record, ("decode", at, batch), decoded)


def _keep(record: Record, at: tuple[str, int, int], made: dict[tuple[str, str], Forecast]) -> None:
    """Put forecasts of a part, length and batch into the record; the first one is the Transformer's."""
    first = next(iter(made.values())).total
    for (name, how), one in made.items():
        about = dict(zip(("part", "length", "batch"), at, strict=True), name=name, how=how)
        key = f"forecast {' '.join(map(str, at))} {name} {how}"
        record.put(key, "done", **about, **asdict(one), total=one.total, ratio=first / one.total)
