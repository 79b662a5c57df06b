"""Do more levels, and slower ones, help? Needles told apart by their keys, by number of levels and period.

The paper's Fig. 7 in small: all models are of one size. What each level does is measured at the end.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from nested_learning.data.synthetic.needle import ANSWER, DIGITS, WORDS, needle_batch, needle_sample
from nested_learning.levels import LevelSpec
from nested_learning.models.bill import count_parameters
from nested_learning.models.config import HopeConfig
from nested_learning.models.lm import HopeLM
from nested_learning.optim.config import OptimConfig
from nested_learning.report import interval
from nested_learning.reproduce.contenders import same_size
from nested_learning.reproduce.experiment import Experiment, Options, Outcome, positive
from nested_learning.reproduce.needle import retrieved
from nested_learning.reproduce.report import Plot, Report
from nested_learning.reproduce.runner import Result, Run, Tick
from nested_learning.reproduce.tasks import recall_optim
from nested_learning.runtime import set_seed
from nested_learning.train.level_report import LevelEffect, LevelWatch
from nested_learning.train.objective import next_token_loss
from nested_learning.train.plain_loop import Batch, Loop, device_of, train_steps

PLAIN = "MLP alone"
HELD_OUT = 4  # batches


@dataclass(frozen=True, kw_only=True, slots=True)
class LevelsRun:
    """One training on needles, and what every level of the trained model does.

    Args:
        model: its vocabulary is that of the grammar.
        length: tokens of a sample, answer included.
        needles: numbers in the haystack, one of them asked for by its key.
        samples: asked at the end.
        steps, batch_size, seed: of the training; the seed decides the initial weights and all data.
        grow: train the fastest level and the plain MLP alone first, and add a slower level after each equal
            part of the steps, with the weights so far. Every stage has a warm-up and a cosine of its own.
    """

    model: HopeConfig
    optim: OptimConfig = field(default_factory=recall_optim)
    length: int = 96
    needles: int = 4
    samples: int = 256
    steps: int = 1500
    batch_size: int = 32
    seed: int = 0
    grow: bool = False

    def run(self, tick: Tick) -> Result:
        """Train. The result holds `right` of `samples`, `loss` (nats per token of the answer), `effects`
        (one `LevelEffect` per level as a dictionary), and the history of the last stage."""
        batches, stages = self._batches(0), self._stages()
        model: HopeLM | None = None
        for number, config in enumerate(stages):
            set_seed(self.seed)
            model = HopeLM(config) if model is None else grown(model, config)
            watch = LevelWatch(model)
            count = self.steps // len(stages) + (self.steps % len(stages)) * (number + 1 == len(stages))
            loop = Loop(steps=count, eval_every=max(1, count // 5))
            history = train_steps(model, batches, self.optim, loop, self._loss, tick)
        assert model is not None
        loss = self._loss(model)
        tokens = next(self._batches(1))[0].to(device_of(model))
        trained = model
        effects = watch.measure(tokens, lambda: self._loss(trained))
        right = retrieved(model.cpu(), self.length, None, self.samples, self.needles, self._rng(2))
        parameters = sum(p.numel() for p in model.parameters())
        found = {"right": right, "loss": loss, "effects": [asdict(effect) for effect in effects]}
        return {**found, "parameters": parameters, **history.to_result()}

    def _stages(self) -> list[HopeConfig]:
        """The models that are trained, one after the other."""
        fast = [level for level in self.model.levels if level.chunk_size is not None]
        if not self.grow or len(fast) < 2:
            return [self.model]
        by_period = sorted(fast, key=lambda level: level.chunk_size or 0)
        kept = [{level.name for level in by_period[: i + 1]} for i in range(len(by_period))]
        return [
            replace(
                self.model,
                levels=tuple(s for s in self.model.levels if s.chunk_size is None or s.name in names),
            )
            for names in kept
        ]

    @torch.no_grad()
    def _loss(self, model: nn.Module) -> float:
        """Mean loss of the answers of held-out samples, the same at every call."""
        losses: list[Tensor] = []
        for tokens, targets in islice(self._batches(1), HELD_OUT):
            device = device_of(model)
            losses.append(next_token_loss(model(tokens.to(device))[0], targets.to(device)))
        return float(torch.stack(losses).mean())

    def _batches(self, part: int) -> Iterator[Batch]:
        rng = self._rng(part)
        while True:
            yield needle_batch(self.batch_size, self.length, rng, self.needles)

    def _rng(self, part: int) -> random.Random:
        """A source of chance of its own for training (0), held-out loss (1) and questions (2)."""
        return random.Random(3 * self.seed + part)


def grown(model: HopeLM, config: HopeConfig) -> HopeLM:
    """A model of `config`, which has further levels, with all weights that `model` has."""
    larger = HopeLM(config)
    for old, new in zip(model.blocks, larger.blocks, strict=True):
        places = {spec.name: i for i, spec in enumerate(new.memory.specs)}  # type: ignore[union-attr, arg-type]
        for i, spec in enumerate(old.memory.specs):  # type: ignore[union-attr, arg-type]
            at = places[spec.name]
            for name in ("norms", "levels"):
                part = getattr(old.memory, name)[i].state_dict()
                getattr(new.memory, name)[at].load_state_dict(part)
    rest = {k: v for k, v in model.state_dict().items() if ".memory." not in k}
    larger.load_state_dict(larger.state_dict() | rest)
    return larger


def add_options(parser: argparse.ArgumentParser) -> None:
    """Levels, sizes, steps and seeds."""
    add = parser.add_argument
    add("--numbers", type=int, nargs="+", default=[0, 1, 2, 3], help="numbers of fast levels beside an MLP")
    add("--fastest", type=positive, default=4, help="period of the fastest level, in tokens; then 4 times it")
    add("--lowest", type=positive, nargs="+", default=[8, 16, 32, 64], help="longer period, of two levels")
    add("--length", type=positive, default=96, help="tokens of a sample")
    add("--needles", type=positive, default=4, help="numbers in the haystack, one of them asked for")
    add("--mixer", default="self_mod", help="sequence mixer of all models")
    add("--dim", type=positive, default=64, help="model width")
    add("--layers", type=positive, default=2, help="blocks")
    add("--samples", type=positive, default=256, help="questions per run")
    add("--steps", type=positive, default=1500, help="updates of a run")
    add("--grow", action="store_true", help="also grow every stack level by level, from the fastest")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])


def plan(options: Options) -> dict[str, list[Run]]:
    """A row per set of levels, a run per seed, all of one size.

    Raises ValueError for a length without room for the needles, or a period that nobody reads.
    """
    needle_sample(options.length, random.Random(0), None, options.needles)
    sets = [tuple(options.fastest * 4**i for i in range(number)) for number in options.numbers]
    sets += [(options.fastest, lowest) for lowest in options.lowest if lowest > options.fastest]
    sets = list(dict.fromkeys(sets))
    if late := [period for periods in sets for period in periods if period >= options.length]:
        raise ValueError(f"periods must be below length = {options.length}, got {late[0]}")
    sizes = {"dim": options.dim, "num_layers": options.layers, "num_heads": 2, "chunk_size": 8}
    base = HopeConfig(vocab_size=len(WORDS), **sizes).with_mixer(options.mixer)
    models = [replace(base, levels=levels_of(periods)) for periods in sets]
    largest = max(map(count_parameters, models))
    rows: dict[str, list[Run]] = {}
    for periods, model in zip(sets, models, strict=True):
        run = LevelsRun(
            model=same_size(model, largest),
            length=options.length,
            needles=options.needles,
            samples=options.samples,
            steps=options.steps,
        )
        label = label_of(periods)
        rows[label] = [replace(run, seed=seed) for seed in options.seeds]
        if options.grow and len(periods) > 1:
            rows[f"{label}, grown"] = [replace(run, seed=seed, grow=True) for seed in options.seeds]
    return rows


def levels_of(periods: tuple[int, ...]) -> tuple[LevelSpec, ...]:
    """Fast levels with these periods before a plain MLP."""
    fast = (LevelSpec(name=f"every{period}", chunk_size=period, expansion=0.5) for period in periods)
    return (*fast, LevelSpec())


def label_of(periods: tuple[int, ...]) -> str:
    """Name of a row."""
    return f"periods {', '.join(map(str, periods))}" if periods else PLAIN


def report(options: Options, outcome: Outcome) -> Report:
    """Accuracy and loss of every set of levels, and what its levels do, mean over seeds."""
    header = ["levels", "parameters", "retrieved", "loss", "change of each", "loss rise when frozen", "idle"]
    rows, numbers = [], []
    for label, cells in outcome.items():
        right = [result["right"] / run.samples for run, result in cells]
        losses = [result["loss"] for _, result in cells]
        effects = summary([[LevelEffect(**one) for one in result["effects"]] for _, result in cells])
        parameters = cells[0][1]["parameters"]
        changes = ", ".join(f"{one['level']} {one['change']:.1e}" for one in effects)
        rises = ", ".join(f"{one['level']} {one['rise']:+.4f}" for one in effects)
        idle = ", ".join(f"{one['level']} ({one['idle']} of {len(cells)})" for one in effects if one["idle"])
        rows.append(
            [
                *(label, f"{parameters:,}", interval(right, ".3f"), interval(losses), changes, rises),
                idle or "none",
            ]
        )
        row = {"levels": label, "parameters": parameters, "seeds": options.seeds}
        numbers.append({**row, "retrieved": right, "loss": losses, "effects": effects})
    lines = [
        (label, [(float(step), value) for step, value in result["curve"]])
        for label, cells in outcome.items()
        for _, result in cells
    ]
    return Report(
        title="Number of levels and lowest frequency",
        header=header,
        rows=rows,
        numbers=numbers,
        notes=_notes(options, outcome),
        plot=Plot(
            lines=lines, xlabel="step (of the last stage)", ylabel="loss of the answer (nats per token)"
        ),
    )


def summary(runs: list[list[LevelEffect]]) -> list[dict[str, Any]]:
    """For every level: mean change, mean rise of the loss when frozen, and on how many runs it is idle."""
    return [
        {
            "level": same[0].level,
            "change": fmean(effect.change for effect in same),
            "rise": fmean(effect.frozen - effect.loss for effect in same),
            "idle": sum(effect.idle is not None for effect in same),
        }
        for same in zip(*runs, strict=True)
    ]


def _notes(options: Options, outcome: Outcome) -> list[str]:
    run: LevelsRun = next(iter(outcome.values()))[0][0]
    return [
        f"{run.needles} needles in {run.length} tokens, one asked for by its key; {run.model.mixer}, width "
        f"{run.model.dim}, {run.model.num_layers} layers, AdamW {run.optim.lr:g}, {run.steps} steps of "
        f"{run.batch_size} samples. The plain MLP is as wide as needed for one number of parameters.",
        f"Retrieved: all {ANSWER} digits right, of {run.samples} questions; a guess among the numbers in the "
        f"haystack is right in {1 / run.needles:.2f}, a blind one in {len(DIGITS) ** -ANSWER:g}. Mean ± 95 % "
        f"interval over seeds {options.seeds}.",
        "Change: norm of a level's change over that of its start, within a sequence for a fast level, "
        "in training for the MLP (since the last stage began). Frozen: a fast level is never written, the "
        "MLP is put back to its start.",
    ]


EXPERIMENT = Experiment(
    name="levels",
    help="number of levels and lowest frequency (Fig. 7 in small), with what each level does",
    add_options=add_options,
    quick={"steps": 2, "seeds": [0], "numbers": [0, 2], "lowest": [16], "samples": 8, "dim": 16, "length": 64}
    | {"needles": 1, "layers": 1},
    plan=plan,
    report=report,
)
