"""Is a two-layer memory worth more than a matrix with as many numbers of state?

Pairs of mixers that differ only in the form of their memories: self-modifying Titans with two-layer and with
linear memories, and Titans beside the gated delta rule. At every number of heads, the hidden width of the
two-layer memories is chosen such that the state of a sequence holds the same number of values.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from nested_learning.models.bill import count_parameters
from nested_learning.models.config import HopeConfig
from nested_learning.report import interval, mean
from nested_learning.reproduce.contenders import CONTENDERS, MLP, same_size, state_size
from nested_learning.reproduce.experiment import Experiment, Options, Outcome, positive
from nested_learning.reproduce.report import Report
from nested_learning.reproduce.runner import Result, Run
from nested_learning.reproduce.tasks import SOLVED, RecallRun, TextRun, recall_model
from nested_learning.reproduce.texts import QUICK, TextDefaults, add_text_options, describe, text_run

PAIRS = {"self_mod": ("hope", "hope_linear"), "titans": ("titans", "gated_delta")}
"""Contenders with two-layer and with linear memories, by name of the pair."""
TWO, LINEAR, DEFAULT = "two layers", "linear", "two layers, default width"


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """What is compared: the `memory` of a contender, and the mixer of `pair` at `heads` heads."""

    pair: str
    heads: int
    memory: str

    @property
    def label(self) -> str:
        """As the plan names it."""
        return f"{self.pair} | {self.heads} | {self.memory}"


def with_state(model: HopeConfig, numbers: int) -> HopeConfig:
    """`model` with two-layer memories of the hidden width whose state is nearest to `numbers`."""

    def of(hidden: int) -> HopeConfig:
        return replace(model, memory=replace(model.memory, hidden=hidden))

    one, two = state_size(of(1), 0), state_size(of(2), 0)
    return of(max(1, 1 + round((numbers - one) / (two - one))))


def models(base: HopeConfig, pairs: list[str], heads: list[int]) -> dict[Row, HopeConfig]:
    """The models of every row: `base` without fast levels, all with about as many parameters."""
    found: dict[Row, HopeConfig] = {}
    base = replace(base, levels=(MLP,))
    for pair in pairs:
        for count in heads:
            two, linear = (CONTENDERS[name].build(replace(base, num_heads=count)) for name in PAIRS[pair])
            found[Row(pair=pair, heads=count, memory=LINEAR)] = linear
            found[Row(pair=pair, heads=count, memory=TWO)] = with_state(two, state_size(linear, 0))
            found[Row(pair=pair, heads=count, memory=DEFAULT)] = two
    parameters = max(count_parameters(model) for model in found.values())
    return {row: same_size(model, parameters) for row, model in found.items()}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Pairs, heads, recall, and the options of text."""
    add = parser.add_argument
    add("--pairs", nargs="+", choices=list(PAIRS), default=list(PAIRS), help="mixers, two-layer and linear")
    add("--head-counts", type=positive, nargs="+", default=[2, 4], help="heads; fewer = more state")
    add("--keys", type=positive, default=16, help="key-value pairs of a recall sequence")
    add("--recall-steps", type=positive, default=400, help="most updates of a run on recall")
    add_text_options(parser, TextDefaults())


def plan(options: Options) -> dict[str, list[Run]]:
    """A row per pair, heads and form of the memory; for every seed a run on text and one on recall."""
    text, recall = text_run(options), recall_run(options)
    on_text = models(text.model, options.pairs, options.head_counts)
    on_recall = models(recall.model, options.pairs, options.head_counts)
    rows: dict[str, list[Run]] = {}
    for row, model in on_text.items():
        runs: list[Run] = [replace(text, model=model, seed=seed) for seed in options.seeds]
        runs += [replace(recall, model=on_recall[row], seed=seed) for seed in options.seeds]
        rows[row.label] = runs
    return rows


def recall_run(options: Options) -> RecallRun:
    """Recall with a vocabulary of four times its keys, at the width of the text runs."""
    vocabulary = 4 * options.keys
    model = replace(recall_model(), vocab_size=vocabulary, dim=options.dim, num_layers=options.layers)
    return RecallRun(model=model, pairs=options.keys, steps=options.recall_steps)


def report(options: Options, outcome: Outcome) -> Report:
    """Loss and accuracy of every row, and what the linear memory of the same pair and heads does to them."""
    header = ["mixer", "heads", "memory", "state", "parameters", "text loss", "to linear"]
    header += ["state (recall)", "recall", f"{SOLVED} at step"]
    rows, numbers = [], []
    for label in outcome:
        pair, heads, memory = label.split(" | ")
        text, recall = _results(outcome, label, TextRun), _results(outcome, label, RecallRun)
        losses, accuracies = _finals(text), _finals(recall)
        reference = _finals(_results(outcome, f"{pair} | {heads} | {LINEAR}", TextRun))
        change = [None if a is None or b is None else a - b for a, b in zip(losses, reference, strict=True)]
        states = [state_size(_model(outcome, label, kind), 0) for kind in (TextRun, RecallRun)]
        parameters, solved = text[0]["parameters"], [result["solved"] for result in recall]
        shown = "-" if memory == LINEAR else interval(change, "+.4f").replace("± +", "± ")
        cells = [pair, heads, memory, f"{states[0]:,}", f"{parameters:,}", interval(losses), shown]
        steps = ", ".join("-" if step is None else str(step) for step in solved)
        rows.append([*cells, f"{states[1]:,}", interval(accuracies, ".3f"), steps])
        row = {"pair": pair, "heads": int(heads), "memory": memory, "seeds": options.seeds}
        row |= {"state": states[0], "recall_state": states[1], "parameters": parameters, "loss": losses}
        row |= {"to_linear": change, "mean": mean(losses), "recall": accuracies, "solved_at": solved}
        numbers.append(row)
    return Report(
        title="Two-layer memories beside linear ones of equal state",
        header=header,
        rows=rows,
        numbers=numbers,
        notes=_notes(options, outcome),
    )


def _of_kind(outcome: Outcome, label: str, kind: type) -> Iterator[tuple[Any, Result]]:
    return ((run, result) for run, result in outcome[label] if isinstance(run, kind))


def _results(outcome: Outcome, label: str, kind: type) -> list[Result]:
    return [result for _, result in _of_kind(outcome, label, kind)]


def _model(outcome: Outcome, label: str, kind: type) -> HopeConfig:
    model: HopeConfig = next(_of_kind(outcome, label, kind))[0].model
    return model


def _finals(results: list[Result]) -> list[float | None]:
    return [result["final"] for result in results]


def _notes(options: Options, outcome: Outcome) -> list[str]:
    label = next(iter(outcome))
    run, result = next(_of_kind(outcome, label, TextRun))
    recall, _ = next(_of_kind(outcome, label, RecallRun))
    return [
        describe(options, run, result) + " Heads as the table says.",
        f'State: numbers in the state of a sequence. "{TWO}": of the hidden width whose state is that of '
        f'"{LINEAR}" with the same heads; "{DEFAULT}": of the width of a head, which is more state. MLPs '
        'as wide as equal parameters ask for. "To linear": difference of losses by seed; below 0: two layers '
        "are better.",
        f"Recall: {recall.pairs} pairs, vocabulary {recall.model.vocab_size}, chunk "
        f"{recall.model.chunk_size}, batch {recall.batch_size}, at most {recall.steps} steps; stops at "
        f"{recall.stop_at}.",
    ]


EXPERIMENT = Experiment(
    name="linear",
    help="two-layer memories beside linear ones of equal state, on text and recall",
    add_options=add_options,
    quick={**QUICK, "recall_steps": 1, "head_counts": [2]},
    plan=plan,
    report=report,
)
