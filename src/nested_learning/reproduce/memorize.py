"""Does learning at test time remember? A trained model reads passages of held-out text, learns from them, and
reads them and other text again, always in a new context: only the weights that learned are kept.

Settings are chosen on half of the passages, and measured on the other half.
"""

from __future__ import annotations

import argparse
import math
import statistics
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from nested_learning.adapt import AdaptConfig, checksum, memorize, restart, score
from nested_learning.adapt.config import PATHS
from nested_learning.config import load_config
from nested_learning.data.corpus import load_corpus
from nested_learning.data.loader import sequential_batches
from nested_learning.report import new_figure
from nested_learning.reproduce.experiment import Experiment, Options, Outcome, output_folder, positive
from nested_learning.reproduce.report import Report
from nested_learning.reproduce.runner import Result, Run, Tick
from nested_learning.train.checkpoint import find_checkpoint, load_checkpoint
from nested_learning.train.launch import launch

NAME = "memorize"
NONE = "nothing"
MODEL = "model"
RATES = {
    "titan": (1.0, 2.0, 4.0),
    "cms_fast": (4.0, 8.0, 16.0),
    "cms": (0.125, 0.25, 0.5),
    "all": (0.125, 0.25, 0.5),
}
ALLOWED = 0.75
"""Rise of the loss on other text, in percent, up to which a setting may be chosen."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelRun:
    """The training of the model, or a look at one that is there.

    Args:
        checkpoint: the model, or the folder of the run of `pilot_smoke` that makes it.
        train_steps: updates of that run; None = take the model as it is.
        modified: when the model was written, so that it is not taken for another one.
    """

    checkpoint: str
    train_steps: int | None = None
    modified: int | None = None

    @property
    def steps(self) -> int:
        """Updates."""
        return self.train_steps or 1

    def run(self, tick: Tick) -> Result:
        """Train, or go on with it. The result holds the `checksum` of the model."""
        if self.train_steps is not None:
            config, folder = load_config("pilot_smoke"), Path(self.checkpoint)
            train = replace(config.train, output_dir=str(folder.parent), steps=self.train_steps)
            if launch(replace(config, name=folder.name, train=train)).interrupted:
                raise KeyboardInterrupt
        tick(self.steps)
        return {"checksum": checksum(load_checkpoint(self.checkpoint)[0])}


@dataclass(frozen=True, kw_only=True, slots=True)
class MemorizeRun:
    """Readings of some passages, with learning after each.

    Args:
        checkpoint: a trained model. model: its checksum, so that it is not taken for another one.
        adapt: what learns, and how.
        passages, length: number of passages (rows of one batch) and their tokens.
        half: 0 = the passages that settings are chosen on, 1 = those they are measured on.
        readings: times that everything is read; the first time nothing has been learned.
    """

    checkpoint: str
    model: str
    adapt: AdaptConfig
    passages: int
    length: int
    half: int
    readings: int = 2

    @property
    def steps(self) -> int:
        """Rounds of learning and reading."""
        return self.readings - 1

    def run(self, tick: Tick) -> Result:
        """Losses of every passage at every reading: `passage` and `other` `[readings][passages]`, in nats;
        `learning`, those of the first reading while it is learned from; `unchanged`, whether the model's
        parameters are what they were."""
        model, _, config = load_checkpoint(self.checkpoint)
        before = checksum(model)
        passages, others = self.texts(load_corpus(config.data).valid)
        keep = self.adapt.paths
        result: dict[str, Any] = {"passage": [], "other": []}
        state = None
        for reading in range(self.readings):
            if reading:
                report, state = memorize(model, passages, state, self.adapt)
                state = restart(model, state, keep)
                result.setdefault("learning", report.losses.mean(1).tolist())
                tick(1)
            for key, text in (("passage", passages), ("other", others)):
                result[key].append(score(model, text, state)[0].mean(1).tolist())
        return {**result, "unchanged": checksum(model) == before}

    def texts(self, held_out: Any) -> tuple[Tensor, Tensor]:
        """Passages and as many other texts, `[passages, length + 1]`: windows spread over the held-out part,
        used in turn as passage and other text of one half, then of the other."""
        (windows,) = sequential_batches(held_out, self.length, 4 * self.passages, 1)
        return windows[2 * self.half :: 4], windows[2 * self.half + 1 :: 4]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Model, passages, and how they are read."""
    parser.add_argument(
        "--checkpoint", type=Path, help="a trained model (default: pilot_smoke, trained first)"
    )
    parser.add_argument("--train-steps", type=positive, help="updates of pilot_smoke (default: those it has)")
    parser.add_argument("--passages", type=positive, default=16, help="passages of each half")
    parser.add_argument("--length", type=positive, default=256, help="tokens of a passage")
    parser.add_argument("--chunk-size", type=positive, default=64, help="tokens between two writes")
    parser.add_argument("--inner-steps", type=positive, nargs="+", default=[1, 2, 4], help="steps per chunk")
    parser.add_argument("--readings", type=positive, default=4, help="readings of the chosen settings")


def plan(options: Options) -> dict[str, list[Run]]:
    """The model: that of `--checkpoint`, or `pilot_smoke` trained in the output folder."""
    if options.checkpoint is not None:
        file = find_checkpoint(options.checkpoint)
        return {MODEL: [ModelRun(checkpoint=str(options.checkpoint), modified=file.stat().st_mtime_ns)]}
    config = load_config("pilot_smoke")
    folder = output_folder(NAME, options)
    steps = options.train_steps or config.train.steps
    return {MODEL: [ModelRun(checkpoint=str(folder / config.name), train_steps=steps)]}


def choose(options: Options, outcome: Outcome) -> dict[str, list[Run]]:
    """A row per path, with a run per learning rate and number of steps, and one where nothing learns."""
    ((model, result),) = outcome[MODEL]
    base = MemorizeRun(
        checkpoint=model.checkpoint,
        model=result["checksum"],
        adapt=AdaptConfig(paths="all", lr=0.0, chunk_size=options.chunk_size),
        passages=options.passages,
        length=options.length,
        half=0,
    )
    rows: dict[str, list[Run]] = {f"choose | {NONE}": [base]}
    for path in PATHS:
        pairs = [(lr, steps) for lr in RATES[path] for steps in options.inner_steps]
        settings = [replace(base.adapt, paths=path, lr=lr, steps=steps) for lr, steps in pairs]
        rows[f"choose | {path}"] = [replace(base, adapt=adapt) for adapt in settings]
    return rows


def measure(options: Options, outcome: Outcome) -> dict[str, list[Run]]:
    """For every row the best setting, on the other passages and with more readings."""
    readings = max(2, options.readings)
    return {
        label.replace("choose", "measure"): [replace(best(row), half=1, readings=readings)]
        for label, row in outcome.items()
        if label != MODEL
    }


def best(row: list[tuple[Any, Result]]) -> Any:
    """The run with the largest fall on the passages of those that leave other text alone; if none does, the
    one with the smallest rise there."""

    def changes(result: Result) -> tuple[float, float]:
        return change(result, "passage")[0], change(result, "other")[0]

    allowed = [entry for entry in row if changes(entry[1])[1] <= ALLOWED]
    if not allowed:
        return min(row, key=lambda entry: changes(entry[1])[1])[0]
    return min(allowed, key=lambda entry: changes(entry[1])[0])[0]


def change(result: Result, key: str) -> tuple[float, float]:
    """Change of the loss from the first to the second reading in percent: mean over passages, and half the
    width of its 95 % interval (1.96 standard errors; 0 for one passage)."""
    first, second = result[key][:2]
    changes = [100 * (b / a - 1) for a, b in zip(first, second, strict=True)]
    spread = statistics.stdev(changes) if len(changes) > 1 else 0.0
    return statistics.fmean(changes), 1.96 * spread / math.sqrt(len(changes))


def report(options: Options, outcome: Outcome) -> Report:
    """Loss on the first and second reading of the passages and of other text, for every path."""
    numbers = [
        _numbers(label, run, result)
        for label, row in outcome.items()
        if label != MODEL
        for run, result in row
    ]
    rows = [_cells(entry) for entry in numbers if entry["part"] == "measure"]
    return Report(
        title="Memorisation at test time",
        header=[
            "what learns",
            "lr",
            "steps",
            "1st reading",
            "2nd reading",
            "change in %",
            "other text before",
            "after",
            "change in %",
            "parameters",
        ],
        rows=rows,
        numbers=numbers,
        notes=[
            f"{options.passages} passages of {options.length} held-out tokens, read and learned in chunks of "
            f"{options.chunk_size}; losses in nats per token, changes as mean over passages ± 1.96 "
            "standard errors.",
            f"Settings were chosen on {options.passages} other passages: the largest fall with at most "
            f"{ALLOWED} % more on other text. Every reading is in a new context.",
        ],
        picture=partial(draw_memory, numbers),
    )


def _numbers(label: str, run: MemorizeRun, result: Result) -> dict[str, Any]:
    part, path = label.split(" | ")
    keys = ("passage", "other")
    losses = {key: [statistics.fmean(values) for values in result[key]] for key in keys}
    changes = {f"{key}_change": change(result, key) for key in keys}
    learning = {"learning": statistics.fmean(result["learning"]), "unchanged": result["unchanged"]}
    settings = {"part": part, "path": path, "lr": run.adapt.lr, "inner_steps": run.adapt.steps}
    return {**settings, **losses, **changes, **learning}


def _cells(numbers: dict[str, Any]) -> list[str]:
    cells = [numbers["path"], f"{numbers['lr']:g}", str(numbers["inner_steps"])]
    for key in ("passage", "other"):
        mean, width = numbers[f"{key}_change"]
        cells += [f"{numbers[key][0]:.4f}", f"{numbers[key][1]:.4f}", f"{mean:+.2f} ± {width:.2f}"]
    return [*cells, "unchanged" if numbers["unchanged"] else "CHANGED"]


def draw_memory(numbers: list[dict[str, Any]], path: Path) -> None:
    """Draw the losses by reading and, for all settings, what was gained against what was lost, as a PNG."""
    figure = new_figure(12, 4)
    first, second, third = figure.subplots(1, 3)
    colours = {row["path"]: f"C{i}" for i, row in enumerate(r for r in numbers if r["part"] == "measure")}
    for row in numbers:
        colour = colours[row["path"]]
        if row["part"] == "measure":
            readings = range(1, len(row["passage"]) + 1)
            first.plot(readings, row["passage"], color=colour, marker=".", label=row["path"])
            second.plot(readings, row["other"], color=colour, marker=".")
        elif row["path"] != NONE:
            size = 12 * row["inner_steps"]
            third.scatter(row["other_change"][0], row["passage_change"][0], s=size, color=colour, alpha=0.7)
    first.set(title="passages", xlabel="reading", ylabel="loss (nats per token)", xticks=list(readings))
    second.set(title="other text", xlabel="reading", ylabel="loss (nats per token)", xticks=list(readings))
    third.set(
        title="settings (large: more steps)", xlabel="change on other text (%)", ylabel="2nd reading (%)"
    )
    third.axvline(1, color="grey", linewidth=0.8, linestyle=":")
    third.axhline(-20, color="grey", linewidth=0.8, linestyle=":")
    first.legend(fontsize="small")
    figure.savefig(path, dpi=120)


EXPERIMENT = Experiment(
    name=NAME,
    help="a trained model adapts to passages of held-out text and reads them, and other text, again",
    add_options=add_options,
    quick={
        "train_steps": 2,
        "passages": 2,
        "length": 48,
        "chunk_size": 16,
        "inner_steps": [1],
        "readings": 3,
    },
    plan=plan,
    report=report,
    follow_ups=(choose, measure),
)
