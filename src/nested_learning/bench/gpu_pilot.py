"""Two training runs side by side: the configured model and the Transformer on the same tokens, as long as the
time allows."""

from __future__ import annotations

import sys
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from nested_learning.bench.gpu_kernels import distrust
from nested_learning.bench.gpu_record import Budget, Entry, Record
from nested_learning.bench.gpu_settings import ARMS, YARDSTICK, GpuSettings
from nested_learning.bench.gpu_speed import check_card, kernels_as, release
from nested_learning.bench.timing import Progress
from nested_learning.config import load_config
from nested_learning.ops import kernels
from nested_learning.report import new_figure
from nested_learning.train.config import RunConfig
from nested_learning.train.launch import launch
from nested_learning.train.metrics import read_metrics

PILOTS = ("hope", YARDSTICK)
LOCAL = Path("outputs/data/local")
"""Shards made from `configs/data/local.yaml`; without them the text that comes with the package is read."""
ROOM = 0.85
"""Share of the time left that the runs are planned for."""
LEAST = 6
"""Steps below which no run is begun."""
PLAN = "pilot plan"


def train_pilots(
    settings: GpuSettings, record: Record, budget: Budget, folder: Path, progress: Progress
) -> None:
    """Train both models for the same number of steps, from the same seed, into the record and `pilot.png`.

    An interrupted call is continued by the next one, from the last checkpoint and with the same plan. Without
    kernels that are known to be right, memories take PyTorch's path.

    Raises:
        LostCardError: see there.
    """
    with kernels_as("torch" if distrust(PILOTS[0], record) else "triton"):
        _train_pilots(settings, record, budget, folder, progress)


def _train_pilots(
    settings: GpuSettings, record: Record, budget: Budget, folder: Path, progress: Progress
) -> None:
    if not record.has(PLAN):
        _remember(record, PLAN, progress, lambda: make_plan(settings, budget, folder))
    plan = record.done(PLAN)
    if plan is None:
        return
    for name in PILOTS:
        key = f"pilot {name}"
        if not record.has(key):
            config = pilot_config(settings, name, folder / "pilot", plan["steps"])
            _remember(record, key, progress, lambda config=config: train(config))
            release(settings)
    plot({name: record.done(f"pilot {name}") for name in PILOTS}, folder / "pilot.png")


def _remember(record: Record, key: str, progress: Progress, run: Any) -> None:
    """Keep what `run` gives, or what it raises: a loss that is not finite is a result, too."""
    try:
        entry = run()
    except Exception as error:  # of any kind
        words = " ".join(str(error).split())
        entry = {"status": "failed", "why": f"{type(error).__name__}: {words[:300]}"}
    record.put(key, **entry)
    progress(f"{key}: {entry.get('why') or entry['status']}")
    check_card(key, entry)


def make_plan(settings: GpuSettings, budget: Budget, folder: Path) -> Entry:
    """How many steps both runs can make, by what a few of them take, and a whole short run around them."""
    if not budget.fits(0):
        return {"status": "skipped", "why": "no time left"}
    step = around = 0.0
    for name in PILOTS:
        config = pilot_config(settings, name, folder / "probe", settings.pilot_probe, probe=True)
        began = time.perf_counter()
        rows = [row for row in train(config)["curve"] if "loss" in row]
        whole = time.perf_counter() - began
        took = rows[-1]["seconds"] - rows[-2]["seconds"]
        step, around = step + took, around + max(0.0, whole - took * settings.pilot_probe)
        release(settings)
    steps = min(settings.pilot_steps, int((ROOM * budget.left() - around) / step))
    if steps < LEAST:
        return {"status": "skipped", "why": f"no time left: a step of both takes {step:.2g} s"}
    return {"status": "done", "steps": steps, "step_seconds": step, "around_seconds": around}


def pilot_config(
    settings: GpuSettings, name: str, folder: Path, steps: int, probe: bool = False
) -> RunConfig:
    """One of the runs. They differ in the model only.

    Args:
        settings: of the benchmark.
        name: of `PILOTS`.
        folder: where the run directory is made.
        steps: of the run.
        probe: every step is logged, compiled as a long run is, and an older run is replaced.
    """
    chosen = any(change.startswith("data=") for change in settings.pilot)
    text = () if chosen else ("data=local" if LOCAL.is_dir() else "data=bundled",)
    length = {
        "train.steps": steps,
        "optim.warmup_steps": max(1, steps // 10),
        "train.log_every": 1 if probe else max(1, steps // 100),
        "train.eval_every": steps if probe else max(1, steps // 5),
        "train.save_every": steps,
    }
    rest = {
        "name": name,
        "train.output_dir": folder,
        "train.device": settings.device,
        "train.level_report": 0,
        "train.sample_tokens": 0,
        "logging.progress": "false",
    }
    rest["train.compile"] = "auto" if settings.compile else "false"
    rest["train.kernels"] = kernels.chosen()
    if probe:
        rest |= {"train.graphs": "true"} if settings.on_card else {}
        rest |= {"train.resume": "null", "train.compile": str(settings.compile and settings.on_card).lower()}
    changes = [f"{key}={value}" for key, value in (length | rest).items()]
    return load_config(settings.config, [*ARMS[name], *text, *settings.pilot, *changes])


def train(config: RunConfig) -> Entry:
    """Train and give the losses over tokens and seconds; what the run prints goes to standard error."""
    with redirect_stdout(sys.stderr):
        result = launch(config)
    if result.interrupted:
        raise KeyboardInterrupt  # the run is saved, and the next call goes on with it
    text = config.data.shards or ", ".join(config.data.files)
    return {
        "status": "done",
        "steps": result.step,
        "valid_loss": result.valid_loss,
        "bits_per_byte": result.bits_per_byte,
        "text": text,
        "curve": curve(config),
    }


def curve(config: RunConfig) -> list[dict[str, float]]:
    """Training and validation losses with the tokens read and the seconds trained so far."""
    rows, seconds, tokens = [], 0.0, 0.0
    for row in read_metrics(config.run_dir / "metrics.jsonl"):
        if "loss" in row:
            seconds += (row["tokens"] - tokens) / row["tokens_per_second"]
            tokens = row["tokens"]
            rows.append({"tokens": tokens, "seconds": seconds, "loss": row["loss"]})
        elif "valid_loss" in row:
            rows.append({"tokens": tokens, "seconds": seconds, "valid_loss": row["valid_loss"]})
    return rows


def plot(runs: dict[str, Entry | None], path: Path) -> None:
    """Losses over tokens and over seconds as a PNG, of those runs that were made."""
    figure = new_figure(11, 4)
    for axes, along in zip(figure.subplots(1, 2), ("tokens", "seconds"), strict=True):
        for number, (name, run) in enumerate(runs.items()):
            rows = [] if run is None else run["curve"]
            for key, style, label in (
                ("loss", "-", f"{name}, training"),
                ("valid_loss", "o", f"{name}, held out"),
            ):
                points = [(row[along], row[key]) for row in rows if key in row]
                if points:
                    axes.plot(
                        *zip(*points, strict=True), style, color=f"C{number}", label=label, markersize=4
                    )
        axes.set(xlabel=along, ylabel="loss (nats per token)")
        if axes.lines:
            axes.legend()
    figure.savefig(path, dpi=120)
