"""Do fast levels help? Validation loss on the bundled text beside plain MLPs of as many parameters."""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from typing import Any

from omegaconf import OmegaConf

from nested_learning.layers.mixer import MIXERS
from nested_learning.layers.mlp import swiglu_width
from nested_learning.levels import LevelSpec
from nested_learning.models.bill import count_parameters
from nested_learning.models.config import HopeConfig
from nested_learning.report import highest, mean, show
from nested_learning.reproduce.experiment import Experiment, Options, Outcome, positive
from nested_learning.reproduce.report import Plot, Report
from nested_learning.reproduce.runner import Result, Run
from nested_learning.reproduce.tasks import TextRun, pilot_run

PLAIN = "plain MLP"
DEFAULT = "default"
NEVER = "never"
SETTINGS: tuple[str, ...] = (DEFAULT, NEVER)
"""Fields of the fast levels (see `LevelSpec`) or `chunks=…`, separated by spaces; "never" = never written."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Model, levels, settings, steps and seeds."""
    add = parser.add_argument
    add("--settings", nargs="+", default=list(SETTINGS), help='such as "chunks=8,64 eta=0.1 target=same"')
    add("--chunks", type=positive, nargs="+", default=[32], help="periods of the fast levels, in tokens")
    add("--expansion", type=float, default=1.0, help="hidden width of each fast level over model width")
    add("--mlp", type=float, default=2.0, help="expansion of the plain MLP beside the fast levels")
    add("--mixer", choices=MIXERS, default="self_mod")
    add("--dim", type=positive, default=128, help="model width")
    add("--layers", type=positive, default=3, help="blocks")
    add("--length", type=positive, default=256, help="tokens per sequence, 2048 per step")
    add("--lr", type=float, default=3e-3, help="highest learning rate")
    add("--steps", type=positive, default=600, help="updates of a run")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2, 3])


def plan(options: Options) -> dict[str, list[Run]]:
    """A row per setting of the fast levels, and one with a plain MLP of at least as many parameters.

    Raises ValueError for a setting that does not exist, or levels that do not fit the model.
    """
    base = _base(options)
    rows: dict[str, list[Run]] = {}
    with_levels = {setting: with_setting(base.model, options, setting) for setting in options.settings}
    parameters = max(count_parameters(model) for model in with_levels.values())
    models = {PLAIN: with_plain_mlp(base.model, parameters), **with_levels}
    for label, model in models.items():
        rows[label] = [replace(base, model=model, seed=seed) for seed in options.seeds]
    return rows


def _base(options: Options) -> TextRun:
    """The run of `configs/pilot_smoke.yaml` with the sizes that `options` ask for."""
    base = pilot_run(options.steps)
    tokens = base.seq_len * base.batch_size
    if tokens % options.length:
        raise ValueError(f"length must divide the {tokens} tokens of a step, got {options.length}")
    model = base.model.with_mixer(options.mixer, dim=options.dim, num_layers=options.layers, seq_len=None)
    return replace(
        base,
        model=model,
        optim=replace(base.optim, lr=options.lr),
        seq_len=options.length,
        batch_size=tokens // options.length,
        eval_every=100,
    )


def with_setting(model: HopeConfig, options: Options, setting: str) -> HopeConfig:
    """`model` with fast levels as `setting` says, over a plain MLP.

    Raises ValueError for a field that a level does not have.
    """
    pairs = [] if setting in (DEFAULT, NEVER) else setting.split()
    if any("=" not in pair for pair in pairs):
        raise ValueError(f'settings must be "{DEFAULT}", "{NEVER}" or pairs of key=value, got {setting!r}')
    raw = OmegaConf.to_container(OmegaConf.from_dotlist([p for p in pairs if not p.startswith("chunks=")]))
    assert isinstance(raw, dict)
    fields: dict[str, Any] = {str(key): value for key, value in raw.items()}
    chunks = [pair.removeprefix("chunks=") for pair in pairs if pair.startswith("chunks=")]
    periods = [int(c) for c in chunks[0].split(",")] if chunks else list(options.chunks)
    if setting == NEVER:
        periods = [1000 * options.length + i for i, _ in enumerate(periods)]
    variant = fields.pop("variant", "sequential")
    unknown = fields.keys() - LevelSpec.__dataclass_fields__.keys()
    if unknown:
        raise ValueError(f"a level has no field {sorted(unknown)[0]!r}, got setting {setting!r}")
    fields.setdefault("expansion", options.expansion)
    fast = tuple(LevelSpec(name=f"fast{i}", chunk_size=period, **fields) for i, period in enumerate(periods))
    levels = (*fast, LevelSpec(expansion=options.mlp))
    return replace(model, levels=levels, cms_variant=variant)


def with_plain_mlp(model: HopeConfig, parameters: int) -> HopeConfig:
    """`model` with one plain MLP, wide enough for at least as many parameters."""

    def of(hidden: int) -> HopeConfig:
        return replace(model, levels=(LevelSpec(expansion=hidden / model.dim),))

    low, high = count_parameters(of(8)), count_parameters(of(16))
    hidden = 8 * max(1, 1 + math.ceil((parameters - low) / (high - low)))
    assert swiglu_width(model.dim, hidden / model.dim) == hidden
    return of(hidden)


def report(options: Options, outcome: Outcome) -> Report:
    """Validation loss of every seed, their mean, and on how many seeds it is below that of the plain MLP."""
    header = ["levels", "parameters", *(f"seed {seed}" for seed in options.seeds), "mean", "to plain", "wins"]
    header += ["max gradient norm", "seconds"]
    plain = _finals(outcome[PLAIN])
    reference = mean(plain)
    rows, numbers = [], []
    for label, cells in outcome.items():
        finals, results = _finals(cells), [result for _, result in cells]
        loss = mean(finals)
        relative = None if loss is None or reference is None else loss / reference - 1
        won = sum(a is not None and (b is None or a < b) for a, b in zip(finals, plain, strict=True))
        wins = "-" if label == PLAIN else f"{won} of {len(finals)}"
        percent = "not finite" if relative is None else f"{relative:+.2%}"
        norm, seconds = highest([r["max_norm"] for r in results]), mean([r["seconds"] for r in results])
        parameters = results[0]["parameters"]
        shown = [show(value) for value in (*finals, loss)]
        rows.append([f"`{label}`", f"{parameters:,}", *shown, percent, wins, show(norm, 2), show(seconds, 0)])
        row = {"levels": label, "parameters": parameters, "seeds": options.seeds, "loss": finals}
        numbers.append({**row, "mean": loss, "relative": relative, "wins": won, "max_norm": norm})
    plot = Plot(lines=_lines(outcome), xlabel="step", ylabel="validation loss (nats per token)")
    return Report(
        title="Fast levels of the Continuum Memory System",
        header=header,
        rows=rows,
        numbers=numbers,
        notes=_notes(options, outcome),
        plot=plot,
    )


def _finals(cells: list[tuple[Any, Result]]) -> list[float | None]:
    return [result["final"] for _, result in cells]


def _notes(options: Options, outcome: Outcome) -> list[str]:
    run, result = next(iter(outcome.values()))[0]
    return [
        f"Validation loss in nats per token on the bundled text after {options.steps} steps of "
        f"{run.batch_size} x {run.seq_len} tokens; unigram entropy {result['unigram_entropy']:.4f}.",
        f"{run.model.mixer}, width {run.model.dim}, {run.model.num_layers} layers, AdamW {run.optim.lr:g}. "
        f"Fast levels written every {options.chunks} tokens, expansion {options.expansion:g}, beside an MLP "
        f"of expansion {options.mlp:g}; the plain MLP alone has at least as many parameters.",
        *([f'"{NEVER}" has the same levels and never writes them.'] if NEVER in outcome else []),
    ]


def _lines(outcome: Outcome) -> list[tuple[str, list[tuple[float, float | None]]]]:
    return [
        (label, [(float(step), value) for step, value in result["curve"]])
        for label, cells in outcome.items()
        for _, result in cells
    ]


EXPERIMENT = Experiment(
    name="cms",
    help="fast levels against plain MLPs of as many parameters, on the bundled text",
    add_options=add_options,
    quick={"steps": 2, "seeds": [0], "dim": 32, "layers": 1, "settings": ["default", "eta=0.1"]},
    plan=plan,
    report=report,
)
