"""What is forgotten when texts of different kinds are learned in a row: HOPE and a Transformer."""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from nested_learning.data.loader import TokenLoader, sequential_batches
from nested_learning.data.tokenizer import ByteTokenizer
from nested_learning.eval.forgetting import (
    Matrix,
    backward_transfer,
    final_average,
    forgetting,
    learned,
    negated,
)
from nested_learning.eval.plots import draw_forgetting
from nested_learning.levels import LevelSpec
from nested_learning.models.bill import count_parameters
from nested_learning.models.config import HopeConfig
from nested_learning.models.lm import HopeLM
from nested_learning.optim.config import OptimConfig
from nested_learning.report import interval
from nested_learning.reproduce.cms import with_plain_mlp
from nested_learning.reproduce.domains import (
    DOMAINS,
    Bytes,
    domain_text,
    domain_tokens,
    training_batches,
)
from nested_learning.reproduce.experiment import Experiment, Options, Outcome, positive
from nested_learning.reproduce.report import Report
from nested_learning.reproduce.runner import Result, Run, Tick
from nested_learning.runtime import set_seed
from nested_learning.train.elastic import Anchor, anchor, penalty_of
from nested_learning.train.level_report import LevelWatch
from nested_learning.train.objective import next_token_loss
from nested_learning.train.plain_loop import Batch, Loop, device_of, train_steps

EWC = 1.0  # of 0, 1, 10, 100 the one with the lowest loss at the end, on seed 100
SEQ_LEN = 128
SLOW_STEPS = 8  # of the optimizer, between two updates of the slow level
END = "loss at the end"
UNDONE = "undone"
MEASURES: dict[str, Callable[[Matrix], float]] = {
    END: lambda losses: -final_average(negated(losses)),
    "loss when learned": lambda losses: -learned(negated(losses)),
    "forgetting": lambda losses: forgetting(negated(losses)),
    "backward transfer": lambda losses: backward_transfer(negated(losses)),
}


def continual_optim() -> OptimConfig:
    """AdamW with a warm-up and a cosine for every domain."""
    return OptimConfig(lr=3e-3, weight_decay=0.01, warmup_steps=10)


@dataclass(frozen=True, kw_only=True, slots=True)
class ContinualRun:
    """A training on one domain after the other, each with an optimizer of its own.

    Args:
        domains: in this order; see `domains.domain_text`.
        replayed: part of the rows of a batch that comes from earlier domains.
        ewc: strength of elastic weight consolidation; 0 = none.
        joint: learn all domains at once instead, with as many steps in all: a bound.
        later: name of the one slow level that learns after the first domain; None = everything does.
        seq_len, batch_size: bytes per row, rows per step.
        steps_per_domain, seed: of the training.
        eval_batches: of 32 held-out rows per domain.
        fisher_rows: that the importance of weights is estimated from.
    """

    model: HopeConfig
    optim: OptimConfig = field(default_factory=continual_optim)
    domains: tuple[str, ...] = DOMAINS
    replayed: float = 0.0
    ewc: float = 0.0
    joint: bool = False
    later: str | None = None
    seq_len: int = SEQ_LEN
    batch_size: int = 16
    steps_per_domain: int = 64
    seed: int = 0
    eval_batches: int = 4
    fisher_rows: int = 64

    @property
    def steps(self) -> int:
        """Updates over all domains."""
        return len(self.domains) * self.steps_per_domain

    def run(self, tick: Tick) -> Result:
        """Train. The result holds `losses`, nats per byte `[T][T]`: row i after learning domain i;
        and `effects`, what each level did after the first domain to the loss on that domain (see
        `LevelEffect`; none if all are learned at once)."""
        set_seed(self.seed)
        model = HopeLM(self.model)
        texts = [domain_tokens(name) for name in self.domains]
        valid = [held_out for _, held_out in texts]
        new = [self._loader(train, self.batch_size, i) for i, (train, _) in enumerate(texts)]
        single = [self._loader(train, 1, i) for i, (train, _) in enumerate(texts, len(texts))]
        rng = random.Random(self.seed)
        losses, anchors = list[list[float]](), list[Anchor]()
        watch: LevelWatch | None = None
        if self.joint:
            self._learn(model, training_batches(new[0], single, 1.0, rng), self.steps, [], tick)
            losses = [self._losses(model, valid)] * len(texts)
        else:
            for i in range(len(texts)):
                batches = training_batches(new[i], single[:i], self.replayed, rng)
                self._learn(model, batches, self.steps_per_domain, anchors, tick)
                losses.append(self._losses(model, valid))
                if watch is None:
                    watch = LevelWatch(model)
                    self._hold(model)
                if self.ewc:
                    rows = (row.to(device_of(model)) for row in islice(single[i], self.fisher_rows))
                    anchors.append(anchor(model, ((row[:, :-1], row[:, 1:]) for row in rows)))
        effects = [] if watch is None else self._effects(watch, valid[0])
        parameters = sum(p.numel() for p in model.parameters())
        return {"losses": losses, "parameters": parameters, "effects": effects}

    def _hold(self, model: HopeLM) -> None:
        """Let nothing but the level `later` learn from now on."""
        if self.later is not None:
            learns = set(model.slow_parameters()[self.later])
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name in learns)

    def _effects(self, watch: LevelWatch, held_out: Bytes) -> list[dict[str, Any]]:
        rows = next(iter(sequential_batches(held_out, self.seq_len, 32, 1)))[:, :-1]

        def loss() -> float:
            return self._losses(watch.model, [held_out])[0]

        return [asdict(effect) for effect in watch.measure(rows.to(device_of(watch.model)), loss)]

    def _loader(self, tokens: Bytes, batch_size: int, number: int) -> TokenLoader:
        return TokenLoader(tokens, self.seq_len, batch_size, 1000 * self.seed + number)

    def _learn(
        self, model: HopeLM, batches: Iterator[Batch], steps: int, anchors: list[Anchor], tick: Tick
    ) -> None:
        loop = Loop(steps=steps, eval_every=steps)
        train_steps(model, batches, self.optim, loop, lambda _: 0.0, tick, penalty_of(anchors, self.ewc))

    @torch.no_grad()
    def _losses(self, model: HopeLM, valid: list[Bytes]) -> list[float]:
        """Held-out loss of every domain."""
        found = []
        for held_out in valid:
            held = sequential_batches(held_out, self.seq_len, 32, self.eval_batches)
            batches = (rows.to(device_of(model)) for rows in held)
            losses = [next_token_loss(model(rows[:, :-1])[0], rows[:, 1:]) for rows in batches]
            found.append(float(torch.stack(losses).mean()))
        return found


def hope_model(seq_len: int, slow_steps: int = SLOW_STEPS) -> HopeConfig:
    """Self-modifying Titans with a fast level, an MLP, and a level stepped every `slow_steps` steps."""
    levels = (
        LevelSpec(name="fast", chunk_size=32, expansion=0.25),
        LevelSpec(name="mlp", expansion=1.5),
        LevelSpec(name="slow", chunk_size=slow_steps * seq_len, expansion=1.0),
    )
    size = {"vocab_size": ByteTokenizer.vocab_size, "dim": 64, "num_layers": 2, "num_heads": 2}
    return HopeConfig(**size, chunk_size=32, levels=levels, seq_len=seq_len)  # type: ignore[arg-type]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Domains, methods, steps and seeds."""
    add = parser.add_argument
    add("--domains", nargs="+", default=list(DOMAINS), help="bundled texts or cipher, in this order")
    add("--replayed", type=float, default=0.25, help="part of a batch from earlier domains, with replay")
    add("--ewc", type=float, default=EWC, help="strength of elastic weight consolidation")
    add("--steps", type=positive, default=64, help="updates per domain")
    add("--sweep", choices=("levels",), help="instead of the methods: settings of the levels of HOPE")
    add("--seeds", type=int, nargs="+", help="default: 0 1 2; of a sweep 100 101 102, which choose")


def seeds_of(options: Options) -> list[int]:
    """The seeds asked for; those of a sweep are others than those reported for the methods."""
    return list(options.seeds or ([100, 101, 102] if options.sweep else [0, 1, 2]))


def level_rows(base: ContinualRun) -> dict[str, ContinualRun]:
    """Settings of the levels, beside `base` (a Transformer): periods, what learns later, learning rates."""
    rows = {}
    for steps in (8, 32, 128):
        rows[f"slow level every {steps} steps"] = replace(base, model=hope_model(SEQ_LEN, steps))
    for steps in (8, 32):
        model = hope_model(SEQ_LEN, steps)
        rows[f"later only the slow level, every {steps}"] = replace(base, model=model, later="slow")
    hope = hope_model(SEQ_LEN)
    fast = tuple(LevelSpec(name=f"every{n}", chunk_size=n, expansion=2.5) for n in (8, 32))
    rows["fast levels only"] = replace(base, model=replace(hope, levels=fast))
    slower = replace(base.optim, lr=base.optim.lr / 3)
    rows["slow level every 8 steps, lr / 3"] = replace(base, model=hope, optim=slower)
    return rows | {"Transformer": base, "Transformer, lr / 3": replace(base, optim=slower)}


def plan(options: Options) -> dict[str, list[Run]]:
    """A row per method, a run per seed. Raises ValueError for a domain that does not exist."""
    if len(options.domains) < 2:
        raise ValueError(f"domains must be at least two, got {options.domains}")
    for name in options.domains:
        domain_text(name)
    hope = hope_model(SEQ_LEN)
    transformer = with_plain_mlp(hope.with_mixer("attention"), count_parameters(hope))
    base = ContinualRun(model=transformer, domains=tuple(options.domains), steps_per_domain=options.steps)
    rows = {
        "HOPE, fine-tuned": replace(base, model=hope),
        "HOPE, replay": replace(base, model=hope, replayed=options.replayed),
        "Transformer, fine-tuned": base,
        "Transformer, EWC": replace(base, ewc=options.ewc),
        "Transformer, replay": replace(base, replayed=options.replayed),
        "Transformer, all at once": replace(base, joint=True),
    }
    if options.sweep == "levels":
        rows = level_rows(base)
    return {name: [replace(run, seed=seed) for seed in seeds_of(options)] for name, run in rows.items()}


def report(options: Options, outcome: Outcome) -> Report:
    """The measures of every method, mean and interval over seeds, and the losses over time."""
    rows, numbers = [], []
    panels: dict[str, list[list[float]]] = {}
    for name, cells in outcome.items():
        matrices = [result["losses"] for _, result in cells]
        found = {key: [measure(matrix) for matrix in matrices] for key, measure in MEASURES.items()}
        joint = cells[0][0].joint
        shown = ["-" if joint and key != END else interval(found[key], ".3f") for key in MEASURES]
        undone = rises([result["effects"] for _, result in cells]) if options.sweep else {}
        told = [", ".join(f"{level} {rise:+.3f}" for level, rise in undone.items())] if options.sweep else []
        rows.append([name, f"{cells[0][1]['parameters']:,}", *shown, *told])
        mean = [[fmean(values) for values in zip(*same, strict=True)] for same in zip(*matrices, strict=True)]
        row = {"method": name, "seeds": seeds_of(options), **found}
        numbers.append({**row, "losses": mean, "undone": undone})
        if not joint:
            panels[name] = mean
    return Report(
        title="Forgetting",
        header=["method", "parameters", *MEASURES, *([UNDONE] if options.sweep else [])],
        rows=rows,
        numbers=numbers,
        notes=_notes(options, outcome),
        picture=partial(_draw, panels, options.domains),
    )


def rises(seeds: list[list[dict[str, Any]]]) -> dict[str, float]:
    """Mean over seeds of what the loss on the first domain rises by when a level is frozen."""
    return {
        same[0]["level"]: fmean(one["frozen"] - one["loss"] for one in same)
        for same in zip(*seeds, strict=True)
    }


def _draw(panels: dict[str, list[list[float]]], domains: list[str], path: Path) -> None:
    draw_forgetting(panels, domains, path, "held-out loss (nats per byte)")


def _notes(options: Options, outcome: Outcome) -> list[str]:
    run: ContinualRun = next(iter(outcome.values()))[0][0]
    return [
        f"{' → '.join(run.domains)}, byte by byte: {run.steps_per_domain} steps of {run.batch_size} x "
        f"{run.seq_len} bytes each, AdamW {run.optim.lr:g} with a warm-up and a cosine per domain; width "
        f"{run.model.dim}, {run.model.num_layers} layers.",
        "Losses in nats per byte on held-out text. Forgetting: rise over the best loss there was, mean over "
        f"all domains but the last. Mean ± 95 % interval over seeds {seeds_of(options)}.",
        *(_sweep_notes(run) if options.sweep else []),
        f"HOPE: self_mod, chunk {run.model.chunk_size}, with a fast level, an MLP, and a level stepped every "
        f"{SLOW_STEPS} steps. Replay: {options.replayed:.0%} of every batch from earlier domains. EWC: "
        f"strength {options.ewc:g}, {run.fisher_rows} rows per domain. All at once: the same number of steps "
        "on all domains, mixed.",
    ]


def _sweep_notes(run: ContinualRun) -> list[str]:
    return [
        f"{UNDONE.capitalize()}: how the loss on the first domain changes at the end if what a level learned "
        "after that domain is undone (a fast level: if it is not written); below 0, the level forgets. Every "
        f"domain has an optimizer of its own: a period of more than {run.steps_per_domain} steps is never "
        "reached, and such a level keeps its initial weights.",
    ]


EXPERIMENT = Experiment(
    name="continual",
    help="texts of different kinds in a row: forgetting of HOPE, a Transformer, EWC and replay",
    add_options=add_options,
    quick={"steps": 2, "seeds": [0], "domains": ["scripture", "cipher"]},
    plan=plan,
    report=report,
)
