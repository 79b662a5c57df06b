"""From what was collected to a page: one run, several runs, an experiment."""

from __future__ import annotations

import base64
import os
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from shlex import quote

from nested_learning.eval.results import interval
from nested_learning.html import Markup, page, picture, preformatted, table
from nested_learning.reporting import figures
from nested_learning.reporting.configuration import changed, describe_level, differing
from nested_learning.reporting.evaluations import Found
from nested_learning.reporting.experiment import (
    ExperimentRecord,
    curve_of,
    numbers_of,
    settings_that_differ,
)
from nested_learning.reporting.parts import (
    STYLE,
    bullets,
    count,
    duration,
    folded,
    number,
    quotation,
    tiles,
)
from nested_learning.reporting.run import FINISHED, RUNNING, RunRecord
from nested_learning.reporting.samples import Sample

Section = tuple[str, list[str | Markup]]
SCRIPTS = {"ddp": "train_dist.py", "fsdp": "train_fsdp.py", "deepspeed": "train_deepspeed.py"}
QUIET = "hydra.run.dir=. hydra.output_subdir=null hydra/job_logging=disabled"
"""Overrides with which Hydra writes no files of its own, as in `configs/base.yaml`."""
SHORT, LONG = 32, 40  # characters of a setting in a legend, and in a table
MOST_RUNS = 200  # of an experiment in its table of runs
WORDS = {
    FINISHED: "The run is finished.",
    RUNNING: "The run is under way; this page shows what it has written so far.",
    "unfinished": "The run is not finished and no process is at work on it; the same command resumes it.",
    "unknown": "How long the run was to be is not known.",
}


# One run


def run_page(record: RunRecord, evaluations: Sequence[Found], samples: Sequence[Sample] | None) -> str:
    """The page of a run.

    Args:
        record: the run.
        evaluations: of its checkpoints.
        samples: of its checkpoints; None if none were asked for.
    """
    sections: list[Section] = [("At a glance", [headline(record), *_missing(record.missing)])]
    sections.append(("Curves", _curves(record)))
    sections.append(("What the levels do", _levels(record)))
    sections.append(("Calendar of levels", _calendar(record)))
    sections.append(("Samples over time", _samples(record, samples)))
    sections.append(("Evaluations", _evaluations(record, evaluations)))
    sections.append(("Commands to try next", [next_commands(record)]))
    sections.append(("Configuration", _configuration(record)))
    return page(f"Run {record.name}", f"{WORDS[record.status]} {record.path}", sections, STYLE)


def headline(record: RunRecord) -> Markup:
    """The numbers to see first."""
    best, bits = record.lowest("valid_loss"), record.lowest("valid_bits_per_byte")
    start = record.starts[-1] if record.starts else None
    device, versions = ("not recorded", "") if start is None else _machine(start)
    return tiles(
        [
            ("status", record.status, f"step {record.step} of {record.steps or 'unknown'}"),
            ("parameters", count(record.parameters), _model(record)),
            ("tokens seen", count(record.tokens), _started(record)),
            ("validation loss, last", number(record.last("valid_loss")), "nats per token"),
            (
                "validation loss, best",
                number(best[1] if best else None),
                f"at step {best[0]:.0f}" if best else "",
            ),
            (
                "bits per byte, best",
                number(bits[1] if bits else None),
                f"last {number(record.last('valid_bits_per_byte'))}" if bits else "",
            ),
            ("training loss, last", number(record.last("loss")), "nats per token, one batch"),
            ("training time", duration(record.seconds), "steps only: no validations, no saves"),
            ("device", device, versions),
        ]
    )


def _started(record: RunRecord) -> str:
    """How often the run was started, as far as that is recorded."""
    times = len(record.starts)
    return "" if not times else "in one start" if times == 1 else f"in {times} starts"


def _model(record: RunRecord) -> str:
    """Mixer, size and levels of the model; "" if they are not known."""
    if record.config is None:
        return ""
    model = record.config.model
    levels = ", ".join(describe_level(level) for level in model.levels)
    return f"{model.mixer}, {model.num_layers} blocks of width {model.dim}; levels {levels}"


def _machine(start: Mapping[str, object]) -> tuple[str, str]:
    """Devices of a start, and its versions."""
    devices = f"{start.get('devices', 1)} × {start.get('device', 'unknown')}"
    names = ("nested_learning", "torch", "python")
    versions = ", ".join(f"{name} {start[name]}" for name in names if name in start)
    return devices, f"{start.get('strategy', '')}; {versions}; last started {start.get('time', 'unknown')}"


def _missing(sentences: Sequence[str]) -> list[str | Markup]:
    return ["What was looked for and not found:", bullets(sentences)] if sentences else []


def _curves(record: RunRecord) -> list[str | Markup]:
    if not record.rows:
        return ["There are no metrics yet."]
    blocks: list[str | Markup] = []
    if record.series("loss") or record.series("valid_loss"):
        blocks.append(picture(figures.loss_figure(record), "Loss over steps, in nats per token."))
    caption = "Learning rate, gradient norm, speed and memory over steps."
    return [*blocks, picture(figures.panels_figure(record), caption)]


def _levels(record: RunRecord) -> list[str | Markup]:
    levels = figures.level_keys(record)
    if not levels:
        return [
            "Nothing is recorded: all levels are plain, train.level_report is 0, parameters are sharded, "
            "or no validation has been made yet."
        ]
    caption = (
        "Taken at every validation. A fast level changes within a sequence, from its initial weights to "
        "those after its last write; a slow or plain one in training, from where it began. Frozen: a fast "
        "level is never written, another is put back to where it began."
    )
    rows = [
        [
            level,
            number(record.last(f"level/{level}/change")),
            number(record.last(f"level/{level}/frozen_loss_rise"), 5),
        ]
        for level in levels
    ]
    last = table(["level", "change, last", "rise of the loss when frozen, last"], rows)
    return [picture(figures.levels_figure(record), caption), last]


def _calendar(record: RunRecord) -> list[str | Markup]:
    if record.config is None:
        return ["Not known without a configuration."]
    figure, sequences = figures.calendar_picture(record)
    caption = (
        f"When which level is written, over {sequences} training sequences of "
        f"{record.config.train.seq_len} tokens, by plan (nl audit counts what really happens). A reset is a "
        "return to the initial weights, a step one of the optimizer."
    )
    return [picture(figure, caption)]


def _samples(record: RunRecord, samples: Sequence[Sample] | None) -> list[str | Markup]:
    own: list[str | Markup] = []
    if record.sample is not None:
        own = ["What the run wrote at its end (sample.txt):", quotation(record.sample)]
    if samples is None:
        return ["None were made for this page, as --no-samples asked.", *own]
    if not samples:
        return ["There is no checkpoint to write any.", *own]
    kept = "all" if len(samples) == len(record.checkpoints) else f"{len(samples)} of the"
    blocks: list[str | Markup] = [
        f"Made for this page by {kept} {len(record.checkpoints)} kept checkpoints, with the prompt and the "
        "seed of the run."
    ]
    for sample in samples:
        blocks.append(f"Step {sample.step}:")
        blocks.append(quotation(sample.text) if sample.text is not None else f"no sample: {sample.problem}")
    return blocks


def _evaluations(record: RunRecord, evaluations: Sequence[Found]) -> list[str | Markup]:
    if not evaluations:
        return [
            "No result file of nl eval names a checkpoint of this run. Looked in the run directory, and in "
            "outputs/eval and results of the folder where the report was made."
        ]
    rows = [
        [
            found.checkpoint,
            found.result.evaluation,
            metric.task,
            metric.name,
            metric.arm,
            f"{metric.value:.4f}",
            interval(metric),
            "" if metric.chance is None else f"{metric.chance:.4g}",
            str(metric.n),
        ]
        for found in evaluations
        for metric in found.result.metrics
    ]
    header = ["checkpoint", "evaluation", "task", "metric", "arm", "value", "95 % interval", "chance", "n"]
    return [table(header, rows), bullets([str(found.path) for found in evaluations])]


def next_commands(record: RunRecord) -> str | Markup:
    """Commands that go on from here, as they can be typed, a line each."""
    path = quote(str(record.path))
    if not record.checkpoints:
        return "There is no checkpoint yet: run the command that started the run again."
    named = f"{path}:best" if record.best is not None else path
    commands = [
        f"uv run nl eval long-perplexity --checkpoint {named}",
        f"uv run nl eval passkey --checkpoint {named}",
        f"uv run nl export {path}",
        f"uv run python train.py train.init_from={path} name={quote(record.path.name + '_more')} "
        "'data.files=[my.txt]'",
    ]
    if record.status not in (FINISHED, RUNNING) and record.written:
        commands.insert(0, f"{_launcher(record)} --config-dir {path} --config-name config {QUIET}")
    return preformatted("\n".join(commands))


def _launcher(record: RunRecord) -> str:
    """What started the run last; `train.py` if that is not recorded."""
    start = record.starts[-1] if record.starts else {}
    script = SCRIPTS.get(start.get("strategy", ""), "train.py")
    if script == "train.py":
        return f"uv run python {script}"
    return f"uv run torchrun --nproc-per-node {start.get('devices', 1)} {script}"


def _configuration(record: RunRecord) -> list[str | Markup]:
    if record.config is None:
        return [folded("config.yaml", record.written)] if record.written else ["Not there."]
    rows = [list(row) for row in changed(record.config)]
    return [
        f"{len(rows)} fields differ from the defaults.",
        table(["field", "value", "default"], rows),
        folded("The whole configuration (config.yaml)", record.written),
    ]


# Several runs


def comparison_page(runs: Sequence[RunRecord]) -> str:
    """The page of several runs, their curves over each other."""
    labelled = dict(zip(labels([record.path for record in runs]), runs, strict=True))
    header = ["run", "status", "step", "parameters", "tokens", "last", "best", "bits per byte", "time"]
    rows = [[label, *_row(record)] for label, record in labelled.items()]
    fields = differing([record.config for record in runs])
    cells = [[name, *values] for name, values in fields]
    caption = (
        "Losses in nats per token. Losses of different tokenizers are not comparable; bits per byte are."
    )
    missing = [f"{label}: {line}" for label, record in labelled.items() for line in record.missing]
    sections: list[Section] = [
        ("Results", ["Validation losses in nats per token; the lowest bits per byte.", table(header, rows)]),
        ("Curves", [picture(figures.comparison_figure(labelled), caption)]),
        (
            "Fields that differ",
            [table(["field", *labelled], cells)] if cells else ["The configurations are the same."],
        ),
        ("Missing", [bullets(missing)] if missing else ["Nothing that was looked for."]),
    ]
    unfinished = sum(record.status != FINISHED for record in runs)
    lead = f"{len(runs)} runs" + (f", {unfinished} of them not finished" if unfinished else ", all finished")
    return page("Comparison of runs", lead, sections, STYLE)


def _row(record: RunRecord) -> list[str]:
    best, bits = record.lowest("valid_loss"), record.lowest("valid_bits_per_byte")
    return [
        record.status,
        f"{record.step} of {record.steps or '?'}",
        count(record.parameters),
        count(record.tokens),
        number(record.last("valid_loss")),
        number(best[1] if best else None),
        number(bits[1] if bits else None),
        duration(record.seconds),
    ]


def labels(paths: Sequence[Path]) -> list[str]:
    """Names for runs: the ends of their paths, from the first folder in which they differ."""
    absolute = [path.resolve() for path in paths]
    if len(set(absolute)) < 2:
        return [path.name for path in absolute]
    common = Path(os.path.commonpath(absolute))
    return [str(path.relative_to(common)) if path != common else path.name for path in absolute]


# An experiment


def experiment_page(record: ExperimentRecord) -> str:
    """The page of an experiment: its table, its picture, and its runs."""
    result: list[str | Markup] = [record.notes] if record.notes else []
    if record.header:
        result.append(table(record.header, record.rows))
    sections: list[Section] = [("Table", [*(result or ["Not made yet."]), *_missing(record.missing)])]
    if record.picture is not None:
        source = base64.b64encode(record.picture).decode("ascii")
        image = f'<figure><img alt="results.png" src="data:image/png;base64,{source}"></figure>'
        sections.append(("Picture", [Markup(image)]))
    named = settings_that_differ(record.runs)
    sections.append(("Curves of the runs", _experiment_curves(record, named)))
    sections.append(("Runs", _experiment_runs(record, named)))
    state = "Runs are being added." if record.running else "No process is at work on it."
    lead = f"{len(record.runs)} finished runs. {state} {record.path}"
    return page(record.title, lead, sections, STYLE)


def _experiment_curves(record: ExperimentRecord, named: Sequence[Mapping[str, str]]) -> list[str | Markup]:
    rows = [(run, names, curve_of(run)) for run, names in zip(record.runs, named, strict=True)]
    with_curve = [(run, names, curve) for run, names, curve in rows if curve]
    if not with_curve:
        return ["The runs of this experiment keep no evaluations over steps."]
    chosen = _telling([names for _, names, _ in with_curve])
    curves = [
        (", ".join(names.get(name, "") for name in chosen) or run["task"], curve)
        for run, names, curve in with_curve
    ]
    told = f"Colours by {', '.join(chosen)}. " if chosen else ""
    caption = f"The evaluations of {len(curves)} runs over steps. {told}What is evaluated, the table says."
    return [picture(figures.curves_figure(curves), caption)]


def _telling(named: Sequence[Mapping[str, str]]) -> list[str]:
    """At most two settings by which to colour curves: not the seed, and with few short values."""
    values: dict[str, Counter[str]] = {}
    for names in named:
        for name, value in names.items():
            values.setdefault(name, Counter())[value] += 1
    fit = [name for name, seen in values.items() if 1 < len(seen) <= 10 and max(map(len, seen)) <= SHORT]
    return [name for name in fit if name != "seed"][:2]


def _experiment_runs(record: ExperimentRecord, named: Sequence[Mapping[str, str]]) -> list[str | Markup]:
    if not record.runs:
        return ["There is no finished run."]
    results = [numbers_of(run) for run in record.runs]
    settings = list(dict.fromkeys(name for names in named for name in names))
    numbers = list(dict.fromkeys(name for values in results for name in values))
    rows = [
        [
            run["task"],
            *(textwrap.shorten(names.get(name, ""), LONG, placeholder=" …") for name in settings),
            *(f"{values[name]:.6g}" if name in values else "" for name in numbers),
        ]
        for run, names, values in zip(record.runs, named, results, strict=True)
    ]
    blocks: list[str | Markup] = ["The settings in which runs differ, and the numbers that they ended with."]
    if len(rows) > MOST_RUNS:
        blocks.append(f"The first {MOST_RUNS} of {len(rows)} runs.")
    return [*blocks, table(["task", *settings, *numbers], rows[:MOST_RUNS])]
