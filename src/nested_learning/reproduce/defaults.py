"""What was tried before the defaults of a memory were chosen: every setting on recall and on text."""

from __future__ import annotations

import argparse
from dataclasses import replace

from omegaconf import OmegaConf

from nested_learning.models.config import HopeConfig
from nested_learning.report import highest, mean, show
from nested_learning.reproduce.experiment import Experiment, Options, Outcome, positive
from nested_learning.reproduce.report import Report
from nested_learning.reproduce.runner import Result, Run, settings_of
from nested_learning.reproduce.tasks import RecallRun, TextRun, pilot_run
from nested_learning.train.config import run_config

DEFAULT = "default"
SETTINGS: tuple[str, ...] = (
    DEFAULT,
    "memory.eta_bias=-1",
    "memory.eta_bias=1",
    "memory.eta_max=1 memory.eta_bias=-3",
    "memory.eta_max=1 memory.eta_bias=-1",
    "memory.alpha_bias=4",
    "memory.alpha_bias=4 memory.retention_target=init",
    "memory.retention_target=init",
    "memory.retention=false",
    "read=before_write",
    "read=after_write",
    "memory.momentum=true",
    "memory.delta=false",
    "memory.adaptive=[]",
    "memory.adaptive=[k,v]",
    "memory.adaptive=[k,v,q,eta,alpha]",
    "memory.self_targets=false",
    "memory.stop_gradient_targets=true",
)
"""Overrides of a `HopeConfig`, separated by spaces, as on the command line of `train.py` after `model.`"""


def with_setting(base: HopeConfig, setting: str) -> HopeConfig:
    """`base` with the overrides of `setting`, such as "read=chunk memory.adaptive=[k,v]".

    Raises ValueError for a key that does not exist or a value that is not allowed.
    """
    if setting == DEFAULT:
        return base
    pairs = setting.split()
    wrong = [pair for pair in pairs if "=" not in pair]
    if wrong or not pairs:
        raise ValueError(f'settings must be "{DEFAULT}" or pairs of key=value, got {setting!r}')
    changed = OmegaConf.merge(base.to_dict(), OmegaConf.from_dotlist(pairs))
    return run_config({"model": OmegaConf.to_container(changed)}).model


def add_options(parser: argparse.ArgumentParser) -> None:
    """Settings, steps and seeds."""
    parser.add_argument(
        "--settings", nargs="+", default=list(SETTINGS), help='such as "read=chunk memory.eta_bias=-1"'
    )
    parser.add_argument("--recall-steps", type=positive, default=400, help="most updates of a run on recall")
    parser.add_argument(
        "--text-steps", type=positive, default=300, help="updates of a run on the bundled text"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])


def plan(options: Options) -> dict[str, list[Run]]:
    """A row per setting. Settings that say what the default says are left out."""
    recall, text = RecallRun(steps=options.recall_steps), pilot_run(options.text_steps)
    rows: dict[str, list[Run]] = {}
    default = _runs(recall, text, DEFAULT, options.seeds)
    for setting in dict.fromkeys((DEFAULT, *options.settings)):
        runs = _runs(recall, text, setting, options.seeds)
        if setting == DEFAULT or [settings_of(r) for r in runs] != [settings_of(r) for r in default]:
            rows[setting] = runs
    return rows


def _runs(recall: RecallRun, text: TextRun, setting: str, seeds: list[int]) -> list[Run]:
    model = with_setting(recall.model, setting)
    runs: list[Run] = [replace(text, model=with_setting(text.model, setting), seed=seed) for seed in seeds]
    if model.chunk_size <= 2 * recall.pairs:  # else the queries begin before anything is written
        runs += [replace(recall, model=model, seed=seed) for seed in seeds]
    return runs


def report(options: Options, outcome: Outcome) -> Report:
    """Recall accuracy and validation loss of every setting."""
    header = [
        "setting",
        "recall",
        "0.95 at step",
        "text loss",
        "to default",
        "max gradient norm",
        "non-finite",
    ]
    reference = mean([result["final"] for result in _of(outcome, DEFAULT, TextRun)])
    rows, numbers = [], []
    for setting in outcome:
        recall, text = _of(outcome, setting, RecallRun), _of(outcome, setting, TextRun)
        accuracy = mean([result["final"] for result in recall]) if recall else None
        solved = [result["solved"] for result in recall]
        loss = mean([result["final"] for result in text])
        relative = None if loss is None or reference is None else loss / reference - 1
        norm = highest([result["max_norm"] for result in recall + text])
        bad = sum(result["nonfinite"] for result in recall + text)
        shown = [show(accuracy, 3) if recall else "-", ", ".join(str(s or "-") for s in solved) or "-"]
        percent = "not finite" if relative is None else f"{relative:+.2%}"
        rows.append([f"`{setting}`", *shown, show(loss), percent, show(norm, 2), str(bad)])
        row = {"setting": setting, "seeds": options.seeds, "recall": accuracy, "solved_at": solved}
        numbers.append({**row, "loss": loss, "relative": relative, "max_norm": norm, "nonfinite": bad})
    notes = _notes(options, outcome)
    return Report(
        title="What was tried for the defaults", header=header, rows=rows, numbers=numbers, notes=notes
    )


def _of(outcome: Outcome, setting: str, kind: type) -> list[Result]:
    return [result for run, result in outcome[setting] if isinstance(run, kind)]


def _notes(options: Options, outcome: Outcome) -> list[str]:
    text = next(run for run, _ in outcome[DEFAULT] if isinstance(run, TextRun))
    return [
        f"Each setting changes the default in what it names. Recall: accuracy after at most "
        f"{options.recall_steps} steps at chunk {RecallRun().model.chunk_size} "
        f"(stopped at {RecallRun().stop_at}).",
        f"Text: validation loss (nats per token) on the bundled text after {options.text_steps} steps at "
        f"T = {text.seq_len}, chunk {text.model.chunk_size}. Mean over seeds {options.seeds}.",
    ]


EXPERIMENT = Experiment(
    name="defaults",
    help="settings of the memories on recall and on the bundled text: the table behind the defaults",
    add_options=add_options,
    quick={"recall_steps": 2, "text_steps": 1, "seeds": [0], "settings": ["read=after_write"]},
    plan=plan,
    report=report,
)
