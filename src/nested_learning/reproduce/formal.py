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
from nested_learning.models.compile import compile_model
from nested_learning.models.config import HopeConfig
from nested_learning.models.lm import HopeLM
from nested_learning.optim.config import OptimConfig
from nested_learning.report import new_figure
from nested_learning.reproduce.experiment import Experiment, Options, Outcome, positive
from nested_learning.reproduce.lstm import LSTMConfig, LSTMModel
from nested_learning.reproduce.report import Report
from nested_learning.reproduce.runner import Result, Run, Tick
from nested_learning.runtime import set_seed
from nested_learning.train.plain_loop import Batch, Loop, device_of, train_steps


def formal_optim(lr: float = 3e-3) -> OptimConfig:
    """AdamW without weight decay, at a constant rate after a warm-up of 50 steps."""
    return OptimConfig(lr=lr, weight_decay=0.0, schedule="constant", warmup_steps=50)


@dataclass(frozen=True, kw_only=True, slots=True)
class FormalRun:
    """One training on a formal language, and how many strings of the reported bins are right.

    Args:
        model: its vocabulary has room for the tokens and the classes of the language.
        language: name in `LANGUAGES`.
        length: longest training string; the reported bins are 2 to `length` and `length + 1` to 2 · `length`.
        strings: of the training, drawn once.
        held_out: strings of the validation split (lengths 2 to 1.2 · `length`), and of each bin.
        steps, batch_size, seed: of the training; the seed decides the initial weights and all strings.
        eval_every: steps between two looks at the validation split; the training stops when it is all right.
        compiled: whether chunks run as compiled graphs, see `models.compile`.
    """

    model: HopeConfig | LSTMConfig
    language: str
    optim: OptimConfig = field(default_factory=formal_optim)
    length: int = 50
    strings: int = 10_000
    held_out: int = 256
    steps: int = 1500
    batch_size: int = 32
    seed: int = 0
    eval_every: int = 50
    compiled: bool = False

    @property
    def bins(self) -> tuple[tuple[int, int], ...]:
        """Shortest and longest string of each reported bin."""
        return (2, self.length), (self.length + 1, 2 * self.length)

    def run(self, tick: Tick) -> Result:
        """Train, then judge the best checkpoint. The result holds `right` (strings of each bin that are right
        at every position), `valid` and `chosen` (share right of the validation split at the checkpoint, and
        its step), and the history of the loop."""
        set_seed(self.seed)
        model = self._build()
        training, valid, *bins = self._splits()
        best = Best(model)

        def evaluate(trained: nn.Module) -> float:
            return best.update(self._right(trained, valid) / len(valid))

        loop = Loop(steps=self.steps, eval_every=self.eval_every, stop_at=1.0)
        history = train_steps(model, self._batches(training), self.optim, loop, evaluate, tick)
        best.restore()
        return {
            "right": [self._right(model, samples) for samples in bins],
            "valid": best.score,
            "chosen": history.curve[best.chosen][0],
            "parameters": sum(p.numel() for p in model.parameters()),
            **history.to_result(),
        }

    def _build(self) -> nn.Module:
        if isinstance(self.model, LSTMConfig):
            return LSTMModel(self.model)
        model = HopeLM(self.model)
        if self.compiled:
            compile_model(model)
        return model

    def _splits(self) -> list[list[Sample]]:
        """Training, validation, bins; what is held out is drawn first and kept out of the training."""
        language, count = LANGUAGES[self.language], self.held_out
        rng = random.Random(f"{self.language} {self.seed}")
        near = (2, self.length + self.length // 5)
        held = [formal_samples(language, count, *lengths, rng) for lengths in (near, *self.bins)]
        known = [tokens for samples in held for tokens, _ in samples]
        return [formal_samples(language, self.strings, 2, self.length, rng, known), *held]

    def _batches(self, samples: list[Sample]) -> Iterator[Batch]:
        rng, length = random.Random(self.seed), self._whole(self.length)
        while True:
            yield formal_batch(rng.choices(samples, k=self.batch_size), length)

    def _whole(self, length: int) -> int:
        """`length`, rounded up to whole chunks: those that are not full would run slowly."""
        chunk = self.model.alignment if isinstance(self.model, HopeConfig) else 1
        return -(-length // chunk) * chunk

    def _right(self, model: nn.Module, samples: list[Sample]) -> int:
        """How many strings are right at every position, asked in batches of the size and shape of the
        training: what is compiled serves both."""
        length = self._whole(max(len(tokens) for tokens, _ in samples))
        right = 0
        for first in range(0, len(samples), self.batch_size):
            part = samples[first : first + self.batch_size]
            filled = part + part[:1] * (self.batch_size - len(part))
            tokens, classes = formal_batch(filled, length)
            right += int(all_right(model, tokens, classes)[: len(part)].sum())
        return right


@torch.no_grad()
def all_right(model: nn.Module, tokens: Tensor, classes: Tensor) -> Tensor:
    """Whether the likeliest class is the right one at every position that has one: `[B, T]` twice → `[B]`."""
    likeliest = model(tokens.to(device_of(model)))[0].argmax(-1).cpu()
    return ((likeliest == classes) | (classes == IGNORE)).all(1)


class Best:
    """The weights of a model when its score was highest; of equal ones, the first."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.score = model, -1.0
        self.seen = self.chosen = 0
        self.weights: dict[str, Tensor] = {}

    def update(self, score: float) -> float:
        """Take note of a score, which is handed back."""
        if score > self.score:
            self.score, self.chosen = score, self.seen
            self.weights = {name: t.detach().clone() for name, t in self.model.state_dict().items()}
        self.seen += 1
        return score

    def restore(self) -> None:
        """Put the best weights back."""
        self.model.load_state_dict(self.weights)


STATES: dict[str, Any] = {"eta_bias": 0.0, "alpha_bias": 8.0}
"""Memories that track states have to be rewritten by one token: steps start at half their bound."""


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
    **{f"HOPE, chunk {chunk}": _memory("self_mod", chunk) for chunk in (1, 2, 4, 8, 16)},
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
    add("--layers", type=positive, default=2)
    add("--heads", type=positive, default=2)
    add("--length", type=positive, default=50, help="longest training string; bins go up to twice that")
    add("--steps", type=positive, default=1500, help="most updates of a run")
    add("--batch-size", type=positive, default=32)
    add("--held-out", type=positive, default=256, help="strings of the validation split and of each bin")
    add(
        "--lrs", type=float, nargs="+", default=[3e-3], help="tried with the first seed; the best one is kept"
    )
    add("--compile", action="store_true", help="chunks as compiled graphs: slow to start, faster steps")
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
        held_out=options.held_out,
        steps=options.steps,
        batch_size=options.batch_size,
        seed=seed,
        compiled=options.compile,
    )


def report(options: Options, outcome: Outcome) -> Report:
    """For every language the median over seeds of both bins, and how many seeds are perfect."""
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
    """ "100 / 98.5 (5, 2)": medians in percent, and how many seeds are perfect."""
    medians = (f"{100 * statistics.median(values):.4g}" for values in (short, long))
    perfect = (str(sum(value == 1 for value in values)) for values in (short, long))
    return f"{' / '.join(medians)} ({', '.join(perfect)})"


def _numbers(cells: list[tuple[Any, Result]], shares: list[list[float]]) -> dict[str, Any]:
    medians = [statistics.median(values) for values in zip(*shares, strict=True)]
    perfect = [sum(value == 1 for value in values) / len(values) for values in zip(*shares, strict=True)]
    names = ("valid", "chosen", "steps", "seconds", "nonfinite")
    by_seed = {name: [result[name] for _, result in cells] for name in names}
    seeds = [run.seed for run, _ in cells]
    return {"seeds": seeds, "right": shares, "median": medians, "perfect": perfect, **by_seed}


def _notes(options: Options, outcome: Outcome) -> list[str]:
    run: FormalRun = next(iter(outcome.values()))[0][0]
    short, long = run.bins
    return [
        f"Percent of strings that are right at every position: median over seeds {options.seeds} for lengths "
        f"{short[0]}–{short[1]} / {long[0]}–{long[1]}, and in brackets how many seeds have every string right. "
        f"{run.held_out} strings per bin and seed.",
        f"Width {options.dim}, {options.layers} layers, {options.heads} heads; batch {run.batch_size}, AdamW at "
        f"{', '.join(f'{lr:g}' for lr in options.lrs)} (chosen on the validation split of the first seed), at "
        f"most {run.steps} steps on {run.strings:,} strings of lengths {short[0]}–{short[1]}.",
        f"The validation split, {run.held_out} other strings of lengths 2–{run.length + run.length // 5}, stops "
        "a run when all of it is right and chooses the checkpoint; nothing is chosen on the reported bins.",
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
        "rows": ["HOPE, chunk 4", "gated delta rule, η ≤ 1", "attention", "LSTM"],
        "length": 16,
        "held_out": 32,
        "compile": False,
    },
    plan=plan,
    report=report,
    follow_ups=(other_seeds,),
)
