"""Formal languages, after Table 5 of the paper: which memories can track a state, beyond the training length?

The languages are in `data.synthetic.formal`. A string counts as right only if every position of it is. Three
splits: training, validation (which stops the training and chooses the checkpoint and the learning rate),
and the two bins that are reported, which nothing is chosen on.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nested_learning.data.padding import IGNORE
from nested_learning.data.synthetic.formal import LANGUAGES, Sample, formal_batch, formal_samples
from nested_learning.models.config import HopeConfig
from nested_learning.models.lm import HopeLM
from nested_learning.optim.config import OptimConfig
from nested_learning.report import new_figure
from nested_learning.reproduce.experiment import Experiment, Options, Outcome, positive
from nested_learning.reproduce.lstm import LSTMConfig, LSTMModel
from nested_learning.reproduce.report import Report
from nested_learning.reproduce.runner import Result, Run, Tick
from nested_learning.runtime import set_seed
from nested_learning.train.plain_loop import Batch, History, Loop, device_of, train_steps


def formal_optim(lr: float = 5e-3) -> OptimConfig:
    """AdamW without weight decay; in every stage a warm-up of 20 steps, then down to a tenth."""
    return OptimConfig(lr=lr, betas=(0.9, 0.99), weight_decay=0.0, warmup_steps=20)


@dataclass(frozen=True, kw_only=True, slots=True)
class FormalRun:
    """One training on a formal language, and how many strings of the reported bins are right.

    It learns short strings first, in stages: up to a quarter of `length`, half of it, all of it. A stage ends
    when its validation split is all right (the last one, when it was so `SURE` times in a row), and the first
    two at the latest after a quarter of the steps.

    Args:
        model: its vocabulary has room for the tokens and the classes of the language.
        language: name in `LANGUAGES`.
        length: longest training string; the reported bins are 2 to `length` and `length + 1` to 2 · `length`.
        strings: training strings of a stage, drawn once.
        held_out: strings of every validation split (lengths 2 to 1.2 times the stage's), and of each bin.
        steps, batch_size, seed: of the training; the seed decides the initial weights and all strings.
        eval_every: steps between two looks at the validation split.
    """

    model: HopeConfig | LSTMConfig
    language: str
    optim: OptimConfig = field(default_factory=formal_optim)
    length: int = 50
    strings: int = 10_000
    held_out: int = 256
    steps: int = 600
    batch_size: int = 16
    seed: int = 0
    eval_every: int = 20

    @property
    def bins(self) -> tuple[tuple[int, int], ...]:
        """Shortest and longest string of each reported bin."""
        return (2, self.length), (self.length + 1, 2 * self.length)

    def run(self, tick: Tick) -> Result:
        """Train, then judge the best checkpoint of the last stage. The result holds `right` (strings of each
        bin that are right at every position), `valid` (share right of the last validation split at that
        checkpoint), `steps`, `stages` (length, steps and best validation share of each) and `seconds`."""
        set_seed(self.seed)
        model = self._build()
        rng = random.Random(f"{self.language} {self.seed}")
        bins = [self._draw(rng, self.held_out, lengths) for lengths in self.bins]
        stages, seconds, nonfinite, best = list[tuple[int, int, float]](), 0.0, 0, Best(model)
        for length, most in self.stages():
            done = sum(steps for _, steps, _ in stages)
            loop = Loop(steps=most or self.steps - done, eval_every=self.eval_every, stop_at=1.0)
            best, history = self._stage(model, length, loop, bins, rng, tick)
            best.restore()
            stages.append((length, len(history.losses), best.score))
            seconds, nonfinite = seconds + history.seconds, nonfinite + history.nonfinite
        tick(self.steps - sum(steps for _, steps, _ in stages))
        return {
            "right": [self._right(model, samples) for samples in bins],
            "valid": best.score,
            "steps": sum(steps for _, steps, _ in stages),
            "stages": stages,
            "parameters": sum(p.numel() for p in model.parameters()),
            "seconds": round(seconds, 1),
            "nonfinite": nonfinite,
        }

    def stages(self) -> list[tuple[int, int | None]]:
        """Longest string of each stage, and its most steps; None = all that are left."""
        part = max(1, self.steps // 4)
        return [(self.length // 4, part), (self.length // 2, part), (self.length, None)]

    def _stage(
        self,
        model: nn.Module,
        length: int,
        loop: Loop,
        bins: list[list[Sample]],
        rng: random.Random,
        tick: Tick,
    ) -> tuple[Best, History]:
        """Train on strings of up to `length`; none of the bins, nor of the validation split."""
        valid = self._draw(rng, self.held_out, (2, length + length // 5), *bins)
        training = self._draw(rng, self.strings, (2, length), valid, *bins)
        best = Best(model, SURE if length == self.length else 1)

        def evaluate(trained: nn.Module) -> float:
            return best.update(self._right(trained, valid) / len(valid))

        def counted() -> Iterator[Batch]:  # a stage that ends early leaves the rest of its steps to the next
            for batch in self._batches(training, length):
                tick(1)
                yield batch

        history = train_steps(model, counted(), self.optim, loop, evaluate, lambda _: None)
        return best, history

    def _draw(
        self, rng: random.Random, count: int, lengths: tuple[int, int], *known: list[Sample]
    ) -> list[Sample]:
        without = [tokens for samples in known for tokens, _ in samples]
        return formal_samples(LANGUAGES[self.language], count, *lengths, rng, without)

    def _build(self) -> nn.Module:
        return LSTMModel(self.model) if isinstance(self.model, LSTMConfig) else HopeLM(self.model)

    def _batches(self, samples: list[Sample], length: int) -> Iterator[Batch]:
        rng, whole = random.Random(self.seed), self._whole(length)
        while True:
            yield formal_batch(rng.choices(samples, k=self.batch_size), whole)

    def _whole(self, length: int) -> int:
        """`length`, rounded up to whole chunks: those that are not full would run slowly."""
        chunk = self.model.alignment if isinstance(self.model, HopeConfig) else 1
        return -(-length // chunk) * chunk

    def _right(self, model: nn.Module, samples: list[Sample]) -> int:
        """How many strings are right at every position."""
        length = self._whole(max(len(tokens) for tokens, _ in samples))
        return int(all_right(model, *formal_batch(samples, length)).sum())


@torch.no_grad()
def all_right(model: nn.Module, tokens: Tensor, classes: Tensor) -> Tensor:
    """Whether the likeliest class is the right one at every position that has one: `[B, T]` twice → `[B]`."""
    likeliest: Tensor = model(tokens.to(device_of(model)))[0].argmax(-1).cpu()
    right: Tensor = (likeliest == classes) | (classes == IGNORE)
    return right.all(1)


class Best:
    """The weights of a model when its score was highest; of equal ones, the last.

    Args:
        times: `update` gives the lowest of so many scores: 1 once a model was perfect so often in a row.
    """

    def __init__(self, model: nn.Module, times: int = 1) -> None:
        self.model, self.score = model, -1.0
        self.last = [0.0] * times
        self.weights: dict[str, Tensor] = {}

    def update(self, score: float) -> float:
        """Take note of a score; returns the lowest of the last ones."""
        if score >= self.score:
            self.score = score
            self.weights = {name: t.detach().clone() for name, t in self.model.state_dict().items()}
        self.last = [*self.last[1:], score]
        return min(self.last)

    def restore(self) -> None:
        """Put the best weights back."""
        self.model.load_state_dict(self.weights)


STATES: dict[str, Any] = {"eta_bias": 0.0, "alpha_bias": 4.0}
"""A state is tracked by writes that replace what is there: steps start at half their bound."""
SURE = 3
"""Perfect validations in a row that end a training."""
STABLE = 2 / 3
"""Bound of η for a token that is alone in its chunk. With the delta term and a target of its own, v̂ = M(v),
a linear memory becomes M(1 − 2η kkᵀ + η vkᵀ). For unit k and v this makes nothing longer if η ≤ 2/3, and
v = −k is then a reflection. At the general bound of 1 it doubles, and gradients through 50 tokens explode."""


def _memory(mixer: str, chunk: int, **memory: Any) -> Callable[[HopeConfig], HopeConfig]:
    """`base` with a mixer that holds memories."""

    def change(base: HopeConfig) -> HopeConfig:
        read = {} if mixer == "linear" else {"read": "after_write"}
        made = base.with_mixer(mixer, chunk_size=chunk, conv_window=1, **read)
        return replace(made, memory=replace(made.memory, **STATES | memory))

    return change


def _attention(base: HopeConfig) -> HopeConfig:
    return base.with_mixer("attention")


def _lstm(base: HopeConfig) -> LSTMConfig:
    return LSTMConfig(vocab_size=base.vocab_size, dim=base.dim, num_layers=base.num_layers)


ROWS: dict[str, Callable[[HopeConfig], HopeConfig | LSTMConfig]] = {
    **{f"HOPE, chunk {c}": _memory("self_mod", c, eta_max=STABLE / c) for c in (1, 2, 4, 8, 16)},
    "HOPE, chunk 1, nothing adaptive": _memory("self_mod", 1, eta_max=STABLE, adaptive=()),
    "HOPE, linear memories": _memory("self_mod_linear", 1, eta_max=STABLE),
    "Titans, chunk 1": _memory("titans", 1),
    "gated delta rule, η ≤ 1": _memory("linear", 64),
    "gated delta rule, η ≤ 2": _memory("linear", 64, eta_max=2.0),
    "attention": _attention,
    "LSTM": _lstm,
}
"""The rows of the table: how each makes its model from the sizes of all."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Rows, languages, sizes, learning rates and seeds."""
    add = parser.add_argument
    add("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="ROW", help=", ".join(ROWS))
    add("--languages", nargs="+", choices=list(LANGUAGES), default=list(LANGUAGES))
    add("--dim", type=positive, default=32, help="width of all models")
    add("--layers", type=positive, default=1)
    add("--heads", type=positive, default=2)
    add("--length", type=positive, default=50, help="longest training string; bins go up to twice that")
    add("--steps", type=positive, default=600, help="most updates of a run")
    add("--batch-size", type=positive, default=16)
    add("--strings", type=positive, default=10_000, help="training strings of each stage")
    add("--held-out", type=positive, default=256, help="strings of the validation split and of each bin")
    rates = "learning rates that the first seed tries; all seeds have the best one"
    add("--lrs", type=float, nargs="+", default=[2e-3, 5e-3, 1e-2], help=rates)
    add("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])


def plan(options: Options) -> dict[str, list[Run]]:
    """For every language, row and learning rate a run of the first seed."""
    return {
        f"{language} | {row} | {lr:g}": [_run(options, language, row, lr, options.seeds[0])]
        for language, row, lr in product(options.languages, options.rows, options.lrs)
    }


def other_seeds(options: Options, outcome: Outcome) -> dict[str, list[Run]]:
    """For every language and row all seeds at the learning rate that is best on the validation split."""
    chosen: dict[str, list[Run]] = {}
    for language, row in product(options.languages, options.rows):
        tried = [outcome[f"{language} | {row} | {lr:g}"][0] for lr in options.lrs]
        best, _ = min(tried, key=lambda cell: (-cell[1]["valid"], cell[1]["steps"]))
        chosen[f"{language} | {row}"] = [replace(best, seed=seed) for seed in options.seeds]
    return chosen


def _run(options: Options, language: str, row: str, lr: float, seed: int) -> FormalRun:
    base = HopeConfig(
        vocab_size=LANGUAGES[language].vocabulary,
        dim=options.dim,
        num_layers=options.layers,
        num_heads=options.heads,
        tie_embeddings=False,
    )
    return FormalRun(
        model=ROWS[row](base),
        language=language,
        optim=formal_optim(lr),
        length=options.length,
        strings=options.strings,
        held_out=options.held_out,
        steps=options.steps,
        batch_size=options.batch_size,
        seed=seed,
    )


def report(options: Options, outcome: Outcome) -> Report:
    """For every language the median of both bins over seeds, and how many seeds are perfect."""
    table: dict[str, list[str]] = {}
    numbers: list[dict[str, Any]] = []
    for language, row in product(options.languages, options.rows):
        cells = outcome[f"{language} | {row}"]
        asked = options.held_out
        shares = [[right / asked for right in result["right"]] for _, result in cells]
        short, long = zip(*shares, strict=True)
        parameters = f"{cells[0][1]['parameters']:,}"
        table.setdefault(row, [row, parameters]).append(_cell(short, long))
        numbers.append(
            {"language": language, "row": row, "lr": cells[0][0].optim.lr, **_numbers(cells, shares)}
        )
    return Report(
        title="Formal languages",
        header=["model", "parameters", *options.languages],
        rows=list(table.values()),
        numbers=numbers,
        notes=_notes(options, outcome),
        picture=partial(_draw, options, numbers),
    )


def _cell(short: Sequence[float], long: Sequence[float]) -> str:
    """Such as "100 / 98.5 (5, 2)": medians in percent, and how many seeds are perfect."""
    medians = (f"{100 * statistics.median(values):.4g}" for values in (short, long))
    perfect = (str(sum(value == 1 for value in values)) for values in (short, long))
    return f"{' / '.join(medians)} ({', '.join(perfect)})"


def _numbers(cells: list[tuple[Any, Result]], shares: list[list[float]]) -> dict[str, Any]:
    medians = [statistics.median(values) for values in zip(*shares, strict=True)]
    perfect = [sum(value == 1 for value in values) / len(values) for values in zip(*shares, strict=True)]
    names = ("valid", "steps", "stages", "seconds", "nonfinite")
    by_seed = {name: [result[name] for _, result in cells] for name in names}
    seeds = [run.seed for run, _ in cells]
    return {"seeds": seeds, "right": shares, "median": medians, "perfect": perfect, **by_seed}


def _notes(options: Options, outcome: Outcome) -> list[str]:
    run: FormalRun = next(iter(outcome.values()))[0][0]
    short, long = run.bins
    return [
        f"Percent of strings right at every position: median over seeds {options.seeds} for lengths "
        f"{short[0]}–{short[1]} / {long[0]}–{long[1]}, in brackets how many seeds have all strings right. "
        f"{run.held_out} strings per bin and seed.",
        f"Width {options.dim}, {options.layers} layer(s), {options.heads} heads; batch {run.batch_size}, "
        f"AdamW at the best of {', '.join(f'{lr:g}' for lr in options.lrs)} on the validation split of the "
        f"first seed; at most {run.steps} steps, in stages with strings of up to "
        f"{', '.join(str(length) for length, _ in run.stages())} tokens.",
        "A validation split (other strings, up to 1.2 times as long as those of the training) ends every "
        "stage and chooses its checkpoint; nothing is chosen on the reported bins.",
    ]


def _draw(options: Options, numbers: list[dict[str, Any]], path: Path) -> None:
    """A map of the medians: a line per row of the table, two columns per language."""
    medians = {(cell["row"], cell["language"]): cell["median"] for cell in numbers}
    grid = [[m for language in options.languages for m in medians[row, language]] for row in options.rows]
    figure = new_figure(4 + 1.4 * len(options.languages), 1.5 + 0.4 * len(options.rows))
    axes = figure.add_subplot()
    axes.imshow(grid, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    for y, values in enumerate(grid):
        for x, value in enumerate(values):
            colour = "white" if value < 0.6 else "black"
            axes.text(x, y, f"{100 * value:.0f}", ha="center", va="center", color=colour, size="small")
    length = options.length
    names = [
        f"{language}\n{bin}" for language in options.languages for bin in (f"–{length}", f"–{2 * length}")
    ]
    axes.set_xticks(range(len(names)), names, size="small")
    axes.set_yticks(range(len(options.rows)), options.rows)
    axes.set_title("strings right at every position, median over seeds (%)", fontsize="medium")
    figure.savefig(path, dpi=120)


EXPERIMENT = Experiment(
    name="formal",
    help="formal languages: HOPE at five chunk sizes, Titans, the gated delta rule, attention, an LSTM",
    add_options=add_options,
    quick={
        "steps": 3,
        "seeds": [0],
        "languages": ["parity", "a^n b^n"],
        "rows": ["HOPE, chunk 8", "gated delta rule, η ≤ 1", "attention", "LSTM"],
        "length": 16,
        "strings": 100,
        "held_out": 32,
        "lrs": [5e-3],
    },
    plan=plan,
    report=report,
    follow_ups=(other_seeds,),
)
