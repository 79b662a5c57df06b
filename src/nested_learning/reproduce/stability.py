"""Does training stay finite? Long runs at the default learning rate, and one at three times that."""

from __future__ import annotations

import argparse
from dataclasses import replace

from nested_learning.report import show
from nested_learning.reproduce.experiment import Experiment, Options, Outcome, positive
from nested_learning.reproduce.report import Plot, Report
from nested_learning.reproduce.runner import Run
from nested_learning.reproduce.tasks import pilot_run

FACTOR = 3.0


def add_options(parser: argparse.ArgumentParser) -> None:
    """Steps and seeds."""
    parser.add_argument("--steps", type=positive, default=1000, help="updates of a run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])


def plan(options: Options) -> dict[str, list[Run]]:
    """A row per seed at the learning rate of `pilot_smoke`, and the first seed at three times that."""
    base = replace(pilot_run(options.steps), eval_every=100)
    steep = replace(base.optim, lr=FACTOR * base.optim.lr)
    rows: dict[str, list[Run]] = {f"{base.optim.lr:g} | {s}": [replace(base, seed=s)] for s in options.seeds}
    first = options.seeds[0]
    return {**rows, f"{steep.lr:g} | {first}": [replace(base, optim=steep, seed=first)]}


def report(options: Options, outcome: Outcome) -> Report:
    """Steps with a loss or gradient that is not finite, gradient norms before clipping, final loss."""
    header = ["learning rate", "seed", "non-finite steps", "max gradient norm", "median", "validation loss"]
    rows, numbers = [], []
    for label, ((run, result),) in outcome.items():
        top, middle = result["max_norm"], result["median_norm"]
        rows.append([*label.split(" | "), str(result["nonfinite"]), show(top, 2), show(middle, 3)])
        rows[-1].append(show(result["final"]))
        kept = {key: result[key] for key in ("nonfinite", "max_norm", "median_norm", "final", "steps")}
        numbers.append({"lr": run.optim.lr, "seed": run.seed, **kept})
    run, result = next(iter(outcome.values()))[0]
    return Report(
        title="Stability",
        header=header,
        rows=rows,
        numbers=numbers,
        notes=[
            f"{options.steps} steps of `configs/pilot_smoke.yaml` ({run.batch_size} sequences of "
            f"{run.seq_len} tokens), gradients clipped at {run.optim.clip_norm}; "
            "losses in nats per token, unigram entropy "
            f"{result['unigram_entropy']:.4f}.",
        ],
        plot=Plot(lines=_lines(outcome), xlabel="step", ylabel="gradient norm before clipping", log="y"),
    )


def _lines(outcome: Outcome) -> list[tuple[str, list[tuple[float, float | None]]]]:
    return [
        (f"learning rate {label.replace(' | ', ', seed ')}", list(enumerate(result["norms"], start=1)))
        for label, ((_, result),) in outcome.items()
    ]


EXPERIMENT = Experiment(
    name="stability",
    help="long runs at the default learning rate and one at three times that",
    add_options=add_options,
    quick={"steps": 3, "seeds": [0]},
    plan=plan,
    report=report,
)
