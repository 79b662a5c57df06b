"""A learning rate of its own for every row of a table.

First every row runs at every rate of a grid on a seed that is used for nothing else. While the best rate is
at the edge of the grid, the grid grows. Then every row runs at its best rate on the seeds of the table. With
a grid of one rate there is nothing to search for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from nested_learning.report import mean
from nested_learning.reproduce.experiment import Outcome, Plan
from nested_learning.reproduce.orthogonal import best_lr
from nested_learning.reproduce.runner import Result, Run

TUNING_SEED = 100
GROWTH = 2.0  # from the edge of the grid to the next rate
SEARCH = "search | "

Runs = Callable[[str, float, int], list[Run]]
"""The runs of a row at a learning rate and a seed; all have `optim.lr`."""
Cells = list[tuple[Any, Result]]
Loss = Callable[[Any, Result], float | None]
"""What the best rate has least of, on average over the runs of a row; None = not finite."""


def final_loss(run: Any, result: Result) -> float | None:
    """The `final` of a result."""
    loss: float | None = result["final"]
    return loss


def search(rows: Sequence[str], rates: Sequence[float], runs: Runs) -> Plan:
    """Every row at every rate, on the seed of the search."""
    return {
        SEARCH + row: [run for rate in rates for run in runs(row, rate, TUNING_SEED)]
        for row in dict.fromkeys(rows)
    }


def at_one_rate(rows: Sequence[str], rate: float, runs: Runs, seeds: Sequence[int]) -> Plan:
    """Every row on the seeds of the table."""
    return {row: [run for seed in seeds for run in runs(row, rate, seed)] for row in dict.fromkeys(rows)}


def searched(outcome: Outcome) -> dict[str, Cells]:
    """The runs of the search by row, sorted by learning rate; without a search, those of the table."""
    found: dict[str, Cells] = {}
    for label, cells in outcome.items():
        if label.startswith(SEARCH):
            found.setdefault(label.removeprefix(SEARCH).split(" | ")[0], []).extend(cells)
    found = found or dict(outcome)
    return {row: sorted(cells, key=lambda cell: cell[0].optim.lr) for row, cells in found.items()}


def final_outcome(outcome: Outcome) -> Outcome:
    """The runs of the table."""
    return {label: cells for label, cells in outcome.items() if not label.startswith(SEARCH)}


def rates_of(cells: Cells) -> list[float]:
    """The learning rates of runs, from the lowest."""
    return sorted({run.optim.lr for run, _ in cells})


def best_rate(cells: Cells, loss: Loss = final_loss) -> float:
    """The rate with the lowest mean loss. Raises ValueError if none is finite."""
    rates = rates_of(cells)
    losses = [mean([loss(run, result) for run, result in cells if run.optim.lr == rate]) for rate in rates]
    return best_lr(rates, [{"final": value} for value in losses])


def how_chosen(rates: Sequence[float], where: str = "") -> str:
    """A sentence for a table's remarks; `where` the search was made, as in " on the first task"."""
    if len(rates) == 1:
        return f"All models have a learning rate of {rates[0]:g}."
    return (
        f"Every model has its own learning rate: the best on seed {TUNING_SEED}{where}, of at least {rates}."
    )


def at_edge(cells: Cells, rate: float) -> bool:
    """Whether a rate is the lowest or the highest of several that were tried."""
    rates = rates_of(cells)
    return len(rates) > 1 and rate in (rates[0], rates[-1])


def widen(outcome: Outcome, runs: Runs, loss: Loss = final_loss) -> Plan:
    """One more learning rate for every row whose best is at the edge of its grid."""
    rows: dict[str, list[Run]] = {}
    for row, cells in searched(outcome).items():
        best = best_rate(cells, loss)
        if at_edge(cells, best):
            beyond = best * GROWTH if best == rates_of(cells)[-1] else best / GROWTH
            rows[f"{SEARCH}{row} | {beyond:g}"] = runs(row, beyond, TUNING_SEED)
    return rows


def final(outcome: Outcome, runs: Runs, seeds: Sequence[int], loss: Loss = final_loss) -> Plan:
    """Every row at its best rate on the seeds of the table."""
    return {
        row: [run for seed in seeds for run in runs(row, best_rate(cells, loss), seed)]
        for row, cells in searched(outcome).items()
    }
