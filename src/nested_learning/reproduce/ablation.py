"""Table 6 of the paper in small: the full model against models that lack one thing.

Two full models: that of the paper (every projection adaptive, with momentum, `experiment=ablation_full`) and
the default of this library (q slow, no momentum), which has more things to take away.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from typing import Any

from nested_learning.config import load_config
from nested_learning.models.bill import count_parameters
from nested_learning.models.config import HopeConfig
from nested_learning.report import interval, mean
from nested_learning.reproduce.cms import with_plain_mlp
from nested_learning.reproduce.defaults import with_setting
from nested_learning.reproduce.experiment import Experiment, Options, Outcome
from nested_learning.reproduce.report import Report
from nested_learning.reproduce.runner import Result, Run
from nested_learning.reproduce.texts import (
    QUICK,
    TextDefaults,
    add_text_options,
    describe,
    text_run,
    with_sizes,
)

FULL = "full"
PAPER, OURS = "paper's full model", "our default"
NO_CMS = "− CMS (one plain MLP)"
BASES = {"paper": PAPER, "ours": OURS}

PAPERS: dict[str, tuple[str, float, float]] = {
    FULL: ("ablation_full", 12.24, 58.1),
    "− delta rule": ("ablation_no_delta", 13.41, 56.5),
    "− momentum": ("ablation_no_momentum", 13.58, 56.9),
    "− weight decay (retention)": ("ablation_no_retention", 13.71, 57.2),
    NO_CMS: ("ablation_no_cms", 13.04, 57.3),
    "− adaptive k": ("ablation_slow_k", 13.77, 56.9),
    "− adaptive v": ("ablation_slow_v", 13.90, 55.1),
    "− adaptive q": ("ablation_slow_q", 12.19, 57.4),
}
"""Rows of Table 6: the configuration of ours that states it, and the paper's perplexity and accuracy."""

SETTINGS: dict[str, str] = {
    "− delta rule": "memory.delta=false",
    "+ momentum": "memory.momentum=true",
    "− weight decay (retention)": "memory.retention=false",
    "− adaptive k": "memory.adaptive=[v,eta,alpha]",
    "− adaptive v": "memory.adaptive=[k,eta,alpha]",
    "+ adaptive q": "memory.adaptive=[k,v,q,eta,alpha]",
    "− adaptive η and α": "memory.adaptive=[k,v]",
    "nothing adaptive": "memory.adaptive=[]",
    "− targets of their own": "memory.self_targets=false",
    "nothing adaptive, targets v": "memory.adaptive=[] memory.self_targets=false",
    "− output gate": "output_gate=false",
    "− convolution": "conv_window=1",
}
"""What is taken from our default, or added to it, as overrides after `model.`"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Which full models, and the options of text."""
    parser.add_argument("--bases", nargs="+", choices=list(BASES), default=["paper"], help="full models")
    add_text_options(parser, TextDefaults())


def plan(options: Options) -> dict[str, list[Run]]:
    """A row per full model and change, a run per seed."""
    run = text_run(options)
    paper, ours = papers_models(options, run.model), our_models(run.model)
    models = {f"{PAPER} | {row}": model for row, model in paper.items() if "paper" in options.bases}
    models |= {f"{OURS} | {row}": model for row, model in ours.items() if "ours" in options.bases}
    return {
        label: [replace(run, model=model, seed=seed) for seed in options.seeds]
        for label, model in models.items()
    }


def papers_models(options: Options, base: HopeConfig) -> dict[str, HopeConfig]:
    """The rows of Table 6, as `configs/experiment/ablation_*.yaml` say them, in the sizes of `base`."""
    models: dict[str, HopeConfig] = {}
    for row, (name, _, _) in PAPERS.items():
        stated = load_config("pilot_smoke", [f"experiment={name}"]).model
        models[row] = with_sizes(stated, options, base.vocab_size)
    models[NO_CMS] = with_plain_mlp(models[FULL], count_parameters(models[FULL]))
    return models


def our_models(full: HopeConfig) -> dict[str, HopeConfig]:
    """The default of the library, and that with one thing changed."""
    models = {FULL: full, **{row: with_setting(full, setting) for row, setting in SETTINGS.items()}}
    models[NO_CMS] = with_plain_mlp(full, count_parameters(full))
    return models


def report(options: Options, outcome: Outcome) -> Report:
    """Losses, and the change of perplexity against the full model of the same seed, beside the paper's."""
    header = ["full model", "change", "parameters", "loss", "perplexity to full", "paper's to full", "sign"]
    rows, numbers = [], []
    for label, cells in outcome.items():
        base, row = label.split(" | ")
        losses = _finals(cells)
        changes = _changes(losses, _finals(outcome[f"{base} | {FULL}"]))
        claimed = _claimed(row)
        parameters = cells[0][1]["parameters"]
        shown = (
            ["-", "-", "-"] if row == FULL else [percents(changes), _percent(claimed), sign(changes, claimed)]
        )
        rows.append([base, row, f"{parameters:,}", interval(losses), *shown])
        number = {"base": base, "change": row, "parameters": parameters, "loss": losses, "mean": mean(losses)}
        numbers.append({**number, "perplexity_change": changes, "papers_change": claimed})
    return Report(
        title="Table 6 in small: what each part is worth",
        header=header,
        rows=rows,
        numbers=numbers,
        notes=_notes(options, outcome),
    )


def _finals(cells: list[tuple[Any, Result]]) -> list[float | None]:
    return [result["final"] for _, result in cells]


def _changes(losses: list[float | None], full: list[float | None]) -> list[float | None]:
    """Perplexity over that of the full model with the same seed, minus 1, for every seed."""
    return [
        None if a is None or b is None else math.exp(a - b) - 1 for a, b in zip(losses, full, strict=True)
    ]


def _claimed(row: str) -> float | None:
    """What the paper says that a change does to perplexity; adding a part is the inverse of removing it."""
    removed = row.replace("+ ", "− ")
    if row == FULL or removed not in PAPERS:
        return None
    ratio = PAPERS[removed][1] / PAPERS[FULL][1]
    return (ratio if removed == row else 1 / ratio) - 1


def percents(changes: list[float | None]) -> str:
    """Mean and 95 % interval in percent."""
    wide = [None if change is None else 100 * change for change in changes]
    return interval(wide, "+.2f").replace("± +", "± ") + (" %" if None not in wide else "")


def _percent(change: float | None) -> str:
    return "-" if change is None else f"{100 * change:+.1f} %"


def sign(changes: list[float | None], claimed: float | None) -> str:
    """Whether the seeds agree with the paper's sign: "same", "opposite", or "open" if they differ."""
    known = [change for change in changes if change is not None]
    if claimed is None or len(known) < len(changes):
        return "-"
    with_paper = sum((change > 0) == (claimed > 0) for change in known)
    return {len(known): "same", 0: "opposite"}.get(with_paper, f"open ({with_paper} of {len(known)})")


def _notes(options: Options, outcome: Outcome) -> list[str]:
    run, result = next(iter(outcome.values()))[0]
    perplexities = ", ".join(f"{row} {ppl}" for row, (_, ppl, _) in PAPERS.items())
    return [
        describe(options, run, result),
        'Loss: validation, nats per token. "Perplexity to full": mean over seeds of the ratio to the full '
        "model of the same seed, with its 95 % interval; + is worse. All rows have the same learning rate.",
        f"The paper's column is the paper's own, from perplexities of models of another size on other text: "
        f"{perplexities}. The sign is the same if it is so on every seed.",
        f'"{NO_CMS}" has at least as many parameters as the full model; other rows have what is left.',
    ]


EXPERIMENT = Experiment(
    name="ablation",
    help="the paper's Table 6 in small: the full model without each of its parts, on text",
    add_options=add_options,
    quick={**QUICK, "bases": ["paper"]},
    plan=plan,
    report=report,
)
