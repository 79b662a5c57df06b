"""Multi-query recall by number of pairs, width and state, also with keys that are written twice.

Models of one size on sequences of `data.synthetic.recall`. Attention needs many more steps than memories to
find out how to recall, and they cost it less: its rows may take more.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from nested_learning.models.config import HopeConfig
from nested_learning.report import interval, mean, new_figure
from nested_learning.reproduce import tuning
from nested_learning.reproduce.contenders import row_label, state_size
from nested_learning.reproduce.experiment import Experiment, Options, Outcome, Plan, positive
from nested_learning.reproduce.mad import (
    add_answer_options,
    shared_notes,
    shared_sizes,
    sized_model,
    slowness,
)
from nested_learning.reproduce.report import Report
from nested_learning.reproduce.runner import Run
from nested_learning.reproduce.tasks import SOLVED, RecallRun, recall_optim
from nested_learning.reproduce.tuning import Cells, Runs

ROWS = ("hope", "hope_plain", "titans", "gated_delta", "transformer", "transformer_conv")


@dataclass(frozen=True, order=True)
class Setting:
    """A width, a number of pairs, and the share of keys that are written twice."""

    dim: int
    pairs: int
    share: float

    @property
    def overwritten(self) -> int:
        """Keys that are written twice."""
        return round(self.share * self.pairs)

    @property
    def tokens(self) -> int:
        """Length of a sequence."""
        return 4 * self.pairs + 2 * self.overwritten


def add_options(parser: argparse.ArgumentParser) -> None:
    """Pairs, widths, overwritten keys, steps, models, rates and seeds."""
    add = parser.add_argument
    add("--pairs", type=positive, nargs="+", default=[8], help="key-value pairs of a sequence")
    add("--dims", type=positive, nargs="+", default=[32, 16], help="model widths")
    shares = "shares of the keys that are written twice, with two values"
    add("--overwritten", type=float, nargs="+", default=[0.0, 0.5], help=shares)
    add("--vocab", type=positive, default=64, help="half keys, half values")
    add("--steps", type=positive, default=500, help="most updates of a model with memories")
    add("--attention-steps", type=positive, default=2000, help="most updates of one with attention")
    add_answer_options(parser, ROWS)


def settings_of(options: Options) -> list[Setting]:
    """All settings of the table. The first one chooses the learning rates.

    Raises:
        ValueError: a share outside of [0, 1].
    """
    wrong = [share for share in options.overwritten if not 0 <= share <= 1]
    if wrong:
        raise ValueError(f"overwritten must be in [0, 1], got {wrong[0]:g}")
    return [Setting(*values) for values in product(options.dims, options.pairs, options.overwritten)]


def _runs(options: Options, settings: list[Setting]) -> Runs:
    def runs(row: str, lr: float, seed: int) -> list[Run]:
        return [_run(options, setting, row, lr, seed) for setting in settings]

    return runs


def _run(options: Options, setting: Setting, row: str, lr: float, seed: int) -> RecallRun:
    model = sized_model(row, setting.dim, options.vocab, **shared_sizes(options))
    steps = options.attention_steps if _attends(model) else options.steps
    return RecallRun(
        model=model,
        optim=replace(recall_optim(), lr=lr),
        pairs=setting.pairs,
        overwritten=setting.overwritten,
        steps=steps,
        seed=seed,
        batch_size=options.batch,
        eval_every=max(1, options.steps // 20),
        eval_batches=options.eval_batches,
    )


def _attends(model: HopeConfig) -> bool:
    return model.mixer in ("attention", "sliding_attention")


def plan(options: Options) -> Plan:
    """The search at the first setting: a row per model, a run per learning rate."""
    if len(options.lrs) == 1:
        runs = _runs(options, settings_of(options))
        return tuning.at_one_rate(options.models, options.lrs[0], runs, options.seeds)
    return tuning.search(options.models, options.lrs, _runs(options, settings_of(options)[:1]))


def widen(options: Options, outcome: Outcome) -> Plan:
    """One more learning rate for every model whose best is at the edge of its grid."""
    return tuning.widen(outcome, _runs(options, settings_of(options)[:1]), slowness)


def final(options: Options, outcome: Outcome) -> Plan:
    """Every model at every setting, at its best rate, a run per seed."""
    return tuning.final(outcome, _runs(options, settings_of(options)), options.seeds, slowness)


def report(options: Options, outcome: Outcome) -> Report:
    """For every width, number of pairs and model: state, accuracy, and when it was learned."""
    finals = tuning.final_outcome(outcome)
    header = ["width", "pairs", "model", "parameters", "state", "learning rate"]
    for share in options.overwritten:
        header += [f"{share:.0%} twice", f"{SOLVED} at step"]
    rows, numbers = [], []
    for dim, pairs, row in product(options.dims, options.pairs, finals):
        found = [_numbers(options, Setting(dim, pairs, s), row, outcome) for s in options.overwritten]
        numbers += found
        first = found[0]
        state = max(cell["state"] for cell in found)
        rate = f"{first['lr']:g}" + " (edge)" * first["lr_at_edge"]
        cells = [str(dim), str(pairs), row_label(row), f"{first['parameters']:,}", f"{state:,}", rate]
        for cell in found:
            cells += [interval(cell["accuracy"], ".3f"), _steps(cell["solved_at"])]
        rows.append(cells)
    return Report(
        title="Multi-query recall by pairs, width and state",
        header=header,
        rows=rows,
        numbers=numbers,
        notes=_notes(options, outcome),
        picture=partial(_draw, options, finals),
    )


def _at(cells: Cells, setting: Setting) -> Cells:
    """The runs of a setting."""
    asked = (setting.dim, setting.pairs, setting.overwritten)
    return [(run, result) for run, result in cells if (run.model.dim, run.pairs, run.overwritten) == asked]


def _numbers(options: Options, setting: Setting, row: str, outcome: Outcome) -> dict[str, Any]:
    cells, searched = _at(outcome[row], setting), tuning.searched(outcome)[row]
    run, results = cells[0][0], [result for _, result in cells]
    return {
        "dim": setting.dim,
        "pairs": setting.pairs,
        "overwritten": setting.overwritten,
        "model": row_label(row),
        "parameters": results[0]["parameters"],
        "state": state_size(run.model, setting.tokens),
        "lr": run.optim.lr,
        "lrs": tuning.rates_of(searched),
        "lr_at_edge": tuning.at_edge(searched, run.optim.lr),
        "seeds": options.seeds,
        "accuracy": [result["final"] for result in results],
        "solved_at": [result["solved"] for result in results],
        "steps": [result["steps"] for result in results],
        "step_seconds": mean([result["step_seconds"] for result in results]),
        "seconds": sum(result["seconds"] for result in results),
        "nonfinite": sum(result["nonfinite"] for result in results),
    }


def _steps(solved: list[int | None]) -> str:
    return ", ".join("-" if step is None else str(step) for step in solved)


def _notes(options: Options, outcome: Outcome) -> list[str]:
    spent = sum(result["seconds"] for cells in outcome.values() for _, result in cells)
    first, values = settings_of(options)[0], options.vocab - options.vocab // 2
    where = f" with {first.pairs} pairs at width {first.dim}"
    return [
        f"Share of values that are right, on fresh sequences; mean over seeds {options.seeds} with its 95 % "
        f'interval. "50% twice": half of the keys are written again with another value, which is then '
        f"the answer. Vocabulary {options.vocab}; guessing among the values gives {1 / values:.3f}.",
        f"At most {options.steps} steps of {options.batch} sequences, with attention "
        f"{options.attention_steps}; a run stops at a held-out accuracy of 0.99. Steps are listed per seed. "
        f"{shared_notes(options)} {tuning.how_chosen(options.lrs, where)}",
        "State: numbers per sequence at its end, of the longer sequences.",
        f"{spent / 60:.0f} minutes of runs in all, on {options.device}.",
    ]


def _draw(options: Options, finals: Outcome, path: Path) -> None:
    """Accuracy over steps: a panel per setting, a colour per model, a line per seed."""
    settings = settings_of(options)
    columns = len(options.overwritten)
    figure = new_figure(4.5 * columns, 3 * len(settings) / columns)
    panels = figure.subplots(len(settings) // columns, columns, squeeze=False, sharey=True).flat
    for axes, setting in zip(panels, settings, strict=True):
        for label, colour, steps, accuracies in _curves(finals, setting):
            axes.plot(steps, accuracies, color=colour, label=label, linewidth=1)
        axes.set_title(
            f"width {setting.dim}, {setting.pairs} pairs, {setting.overwritten} twice", fontsize="small"
        )
        axes.set(xlabel="step", xscale="log", ylim=(0, 1.02))
    figure.axes[0].set_ylabel("held-out accuracy")
    figure.axes[0].legend(fontsize="x-small")
    figure.savefig(path, dpi=120)


def _curves(finals: Outcome, setting: Setting) -> Iterator[tuple[str | None, str, list[int], list[float]]]:
    """Label (once per model), colour, steps and accuracies of every run of a setting."""
    for i, (row, cells) in enumerate(finals.items()):
        for j, (_, result) in enumerate(_at(cells, setting)):
            steps, accuracies = zip(*result["curve"], strict=True)
            yield row_label(row) if j == 0 else None, f"C{i}", list(steps), list(accuracies)


EXPERIMENT = Experiment(
    name="mqar",
    help="recall by pairs, width and state, also of keys written twice: HOPE, Titans, delta rule, attention",
    add_options=add_options,
    quick={
        "steps": 2,
        "attention_steps": 2,
        "seeds": [0],
        "lrs": [6e-3],
        "models": ["hope", "transformer"],
        "pairs": [4],
        "dims": [16],
        "layers": 1,
        "batch": 4,
        "eval_batches": 1,
    },
    plan=plan,
    report=report,
    follow_ups=(widen, widen, final),
)
