"""Is HOPE better than a Transformer? Models of equal size on the same text, each at its own learning rate.

How a model gets its learning rate: `reproduce.tuning`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from nested_learning.models.bill import count_parameters
from nested_learning.models.config import HopeConfig
from nested_learning.report import interval, mean, show
from nested_learning.reproduce import tuning
from nested_learning.reproduce.contenders import CONTENDERS, build_row, row_label, same_size, state_size
from nested_learning.reproduce.experiment import Experiment, Options, Outcome, Plan
from nested_learning.reproduce.report import Plot, Report
from nested_learning.reproduce.runner import Result, Run
from nested_learning.reproduce.tasks import TextRun, shifted_text
from nested_learning.reproduce.texts import QUICK, TextDefaults, add_text_options, describe, text_run
from nested_learning.reproduce.tuning import Runs

LRS = (1.5e-3, 3e-3, 6e-3)
ROWS = (
    "hope",
    "hope_linear",
    "hope_attention",
    "titans",
    "gated_delta",
    "gated_delta_2",
    "sliding_attention",
    "transformer",
    "transformer_conv",
)
REFERENCE = "transformer"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Models, sizes, text, rates, steps and seeds."""
    add = parser.add_argument
    add(
        "--models",
        nargs="+",
        default=list(ROWS),
        help=f'of {", ".join(CONTENDERS)}; with options of the model behind: "hope memory.momentum=true"',
    )
    shift = 'text of another kind that the trained models read too: files, or "bundled"'
    add("--shift", nargs="+", default=[], help=shift)
    add_text_options(parser, TextDefaults(length=256, steps=400), LRS)


@dataclass(frozen=True)
class Base:
    """What all rows share: a run of HOPE, and its number of parameters."""

    run: TextRun
    parameters: int


def base_of(options: Options) -> Base:
    """A run of HOPE at the sizes that `options` ask for."""
    run = replace(text_run(options), eval_every=max(1, options.steps // 10), shift=tuple(options.shift))
    if run.shift:
        shifted_text(run.data, run.shift)  # once and here: parallel runs then only open it
    return Base(run, count_parameters(run.model))


def model_of(base: Base, row: str) -> HopeConfig:
    """The model of "name" or "name key=value …", with about as many parameters as HOPE.

    Raises ValueError for a name, key or value that does not exist.
    """
    return same_size(build_row(row, base.run.model), base.parameters)


def _runs(options: Options) -> Runs:
    base = base_of(options)

    def runs(row: str, lr: float, seed: int) -> list[Run]:
        run = base.run
        return [replace(run, model=model_of(base, row), optim=replace(run.optim, lr=lr), seed=seed)]

    return runs


def plan(options: Options) -> Plan:
    """The search: a row per model, a run per learning rate."""
    if len(options.lrs) == 1:
        return tuning.at_one_rate(options.models, options.lrs[0], _runs(options), options.seeds)
    return tuning.search(options.models, options.lrs, _runs(options))


def widen(options: Options, outcome: Outcome) -> Plan:
    """One more learning rate for every model whose best is at the edge of its grid."""
    return tuning.widen(outcome, _runs(options))


def final(options: Options, outcome: Outcome) -> Plan:
    """Every model at its best rate, a run per seed."""
    return tuning.final(outcome, _runs(options), options.seeds)


def report(options: Options, outcome: Outcome) -> Report:
    """Losses with intervals, on how many seeds a model is below the Transformer, and what it costs."""
    searched, finals = tuning.searched(outcome), tuning.final_outcome(outcome)
    numbers = [_numbers(row, cells, finals, searched[row]) for row, cells in finals.items()]
    header = ["model", "parameters", "state", "learning rate", "validation loss", "to Transformer", "wins"]
    header += ["first eighth", "last eighth", *(["other text"] if options.shift else []), "step (ms)"]
    return Report(
        title="Language modelling at equal size",
        header=header,
        rows=[_cells(row, bool(options.shift)) for row in numbers],
        numbers=numbers,
        notes=_notes(options, outcome),
        plot=(
            _curves(finals, lambda run, _: run.seq_len * run.batch_size, "tokens"),
            _curves(finals, lambda _, result: result["step_seconds"], "seconds, without evaluations"),
        ),
    )


def _curves(finals: Outcome, of_a_step: Callable[[Any, Result], float], xlabel: str) -> Plot:
    """Validation losses over what the steps before them took."""
    lines = [
        (row_label(row), [(at * of_a_step(run, result), loss) for at, loss in result["curve"]])
        for row, cells in finals.items()
        for run, result in cells
    ]
    return Plot(lines=lines, xlabel=xlabel, ylabel="validation loss (nats per token)")


def _numbers(
    row: str, cells: list[tuple[Any, Result]], finals: Outcome, searched: list[tuple[Any, Result]]
) -> dict[str, Any]:
    losses = [result["final"] for _, result in cells]
    reference = [result["final"] for _, result in finals.get(REFERENCE, [])]
    pairs = zip(losses, reference, strict=True) if reference else ()
    model = cells[0][0].model
    average, other = mean(losses), mean(reference) if reference else None
    best = cells[0][0].optim.lr
    return {
        "model": row_label(row),
        "parameters": cells[0][1]["parameters"],
        "state": state_size(model, cells[0][0].seq_len),
        "lr": best,
        "lrs": tuning.rates_of(searched),
        "lr_at_edge": tuning.at_edge(searched, best),
        "seeds": [run.seed for run, _ in cells],
        "loss": losses,
        "relative": None if average is None or not other else average / other - 1,
        "wins": sum(a is not None and b is not None and a < b for a, b in pairs) if reference else None,
        "by_position": [
            mean(list(column)) for column in zip(*(r["by_position"] for _, r in cells), strict=True)
        ],
        "shifted": [None if losses is None else mean(losses) for losses in (r["shifted"] for _, r in cells)],
        "step_seconds": mean([result["step_seconds"] for _, result in cells]),
        "seconds": sum(result["seconds"] for _, result in cells),
        "nonfinite": sum(result["nonfinite"] for _, result in cells),
    }


def _cells(row: dict[str, Any], shift: bool) -> list[str]:
    relative = "-" if row["relative"] is None else f"{row['relative']:+.2%}"
    first, last = row["by_position"][0], row["by_position"][-1]
    rate = f"{row['lr']:g}" + " (edge)" * row["lr_at_edge"]
    return [
        row["model"],
        f"{row['parameters']:,}",
        f"{row['state']:,}",
        rate,
        interval(row["loss"]),
        relative,
        "-" if row["wins"] is None else f"{row['wins']} of {len(row['loss'])}",
        show(first),
        show(last),
        *([interval(row["shifted"])] if shift else []),
        show(1000 * row["step_seconds"], 0),
    ]


def _notes(options: Options, outcome: Outcome) -> list[str]:
    run, result = next(iter(outcome.values()))[0]
    spent = sum(result["seconds"] for cells in outcome.values() for _, result in cells)
    return [
        f"Validation loss in nats per token after {describe(options, run, result)}",
        f"{tuning.how_chosen(options.lrs)} MLPs are as wide as equal parameters ask for. State: numbers per "
        "sequence at its end. Wins: seeds below the Transformer.",
        f"{spent / 60:.0f} minutes of runs in all, on {options.device}.",
    ]


EXPERIMENT = Experiment(
    name="text",
    help="HOPE, Titans, gated delta rule and Transformers of one size on text",
    add_options=add_options,
    quick={**QUICK, "lrs": [3e-3], "models": ["hope", "hope_linear", "transformer"]},
    plan=plan,
    report=report,
    follow_ups=(widen, widen, final),
)  # fmt: skip
