"""A needle in a haystack: small models trained at one length, asked at up to eight times that length.

The grammar is RULER's, word by word (`data.synthetic.needle`); the answer is generated greedily. Of models
whose memories rewrite themselves, the table also says how far each memory moves while it reads.

Shapes: B rows, T tokens.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nested_learning.data.synthetic.needle import ANSWER, DIGITS, WORDS, needle_batch, needle_sample
from nested_learning.eval.plots import draw_maps
from nested_learning.eval.results import wilson
from nested_learning.layers.self_modifying import SelfModState
from nested_learning.models.config import HopeConfig
from nested_learning.models.lm import HopeLM
from nested_learning.optim.config import OptimConfig
from nested_learning.reproduce.contenders import CONTENDERS, build_row, row_label
from nested_learning.reproduce.experiment import Experiment, Options, Outcome, positive
from nested_learning.reproduce.report import Report
from nested_learning.reproduce.runner import Result, Run, Tick
from nested_learning.reproduce.tasks import recall_optim
from nested_learning.runtime import set_seed
from nested_learning.state import ModelState
from nested_learning.train.plain_loop import Batch, Loop, device_of, train_steps

MODELS = ("hope", "hope_plain", "titans", "sliding_attention", "transformer")
TARGET = 0.95
"""Accuracy at the training length from which the task counts as learned."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NeedleRun:
    """One training, and the accuracy of the trained model by length and depth.

    Args:
        model: its vocabulary is that of the grammar.
        length: tokens of a training sample, answer included; needles are at random depths.
        needles: numbers in the haystack, one of them asked for.
        multiples: lengths to ask at, over `length`.
        depths: places of the needle to ask at.
        samples: per length and depth.
        steps, batch_size, seed: of the training; the seed decides the initial weights and all data.
        eval_every: steps between evaluations, each on 128 fresh samples of the training length.
        stop_at: accuracy that ends the training early.
    """

    model: HopeConfig
    optim: OptimConfig = field(default_factory=recall_optim)
    length: int = 64
    needles: int = 1
    multiples: tuple[int, ...] = (1, 2, 4, 8)
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    samples: int = 32
    steps: int = 4000
    batch_size: int = 32
    seed: int = 0
    eval_every: int = 50
    stop_at: float = 0.99

    def run(self, tick: Tick) -> Result:
        """Train, then ask. The result holds `right`, the number of right answers by length and depth, `moved`
        (see `moved`), and the history of the loop."""
        set_seed(self.seed)
        model = HopeLM(self.model)

        def evaluate(trained: nn.Module) -> float:
            assert isinstance(trained, HopeLM)
            return retrieved(trained, self.length, None, 128, self.needles, self._rng(1)) / 128

        loop = Loop(steps=self.steps, eval_every=self.eval_every, stop_at=self.stop_at)
        history = train_steps(model, self._batches(), self.optim, loop, evaluate, tick)
        rng = self._rng(2)
        right = [
            [
                retrieved(model, self.length * times, depth, self.samples, self.needles, rng)
                for depth in self.depths
            ]
            for times in self.multiples
        ]
        parameters = sum(p.numel() for p in model.parameters())
        away = moved(model.cpu(), [self.length * times for times in self.multiples], self._rng(2))
        return {"right": right, "moved": away, "parameters": parameters, **history.to_result()}

    def _batches(self) -> Iterator[Batch]:
        rng = self._rng(0)
        while True:
            yield needle_batch(self.batch_size, self.length, rng, self.needles)

    def _rng(self, part: int) -> random.Random:
        """A source of chance of its own for training (0), the evaluations of the loop (1) and the map (2)."""
        return random.Random(3 * self.seed + part)


def retrieved(
    model: HopeLM, length: int, depth: float | None, count: int, needles: int, rng: random.Random
) -> int:
    """How many of `count` samples the model answers right, all digits, by greedy generation."""
    samples = [needle_sample(length, rng, depth, needles) for _ in range(count)]
    right = 0
    for first in range(0, count, 32):
        part = samples[first : first + 32]
        prompts, answers = (
            torch.tensor(tokens, device=device_of(model)) for tokens in zip(*part, strict=True)
        )
        said = model.generate(prompts, ANSWER, temperature=0)[:, -ANSWER:]
        right += int((said == answers).all(1).sum())
    return right


@torch.no_grad()
def moved(model: HopeLM, lengths: Sequence[int], rng: random.Random, rows: int = 8) -> dict[str, list[float]]:
    """How far every memory of a `self_mod` or `titans` model is from where it began, after `lengths` tokens.

    Returns:
        By memory and length ‖W − W₀‖ / ‖W₀‖ over both layers' weights, averaged over blocks and rows; no
        memory for other mixers.
    """
    prompts = [needle_sample(max(lengths) + ANSWER, rng)[0] for _ in range(rows)]
    tokens, state, read = torch.tensor(prompts, device=device_of(model)), model.init_state(rows), 0
    start, found = weights_by_memory(state), dict[str, list[float]]()
    for length in sorted(lengths):
        _, state = model(tokens[:, read:length], state)
        read = length
        for name, now in weights_by_memory(state).items():
            away = (now - start[name]).norm(dim=-1) / start[name].norm(dim=-1)
            found.setdefault(name, []).append(float(away.mean()))
    return found


def weights_by_memory(state: ModelState) -> dict[str, Tensor]:
    """The fast weights of every memory of the mixers by name, `[blocks, B, numbers]`."""
    found: dict[str, list[Tensor]] = {}
    for layer in state.layers:
        if not isinstance(layer.mixer, SelfModState):
            return {}
        names = iter(name for name, _ in layer.mixer.chunks)
        for bank in layer.mixer.banks:
            second = [w1 for group in bank.w1 for w1 in group.unbind(2)]
            for w2, w1 in zip(bank.w2.unbind(2), second, strict=True):
                found.setdefault(next(names), []).append(torch.cat([w2.flatten(1), w1.flatten(1)], 1))
    return {name: torch.stack(weights) for name, weights in found.items()}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Model, length, samples, steps and seeds."""
    add = parser.add_argument
    add(
        "--models",
        nargs="+",
        default=list(MODELS),
        help=f'of {", ".join(CONTENDERS)}; with options of the model behind: "hope memory.adaptive=[k]"',
    )
    add(
        "--length",
        type=positive,
        default=64,
        help="training length, and window of sliding attention",
    )
    add("--needles", type=positive, default=1, help="numbers in the haystack, one of them asked for")
    add("--multiples", type=positive, nargs="+", default=[1, 2, 4, 8], help="lengths asked at, over --length")
    add("--depths", type=positive, default=5, help="places of the needle, evenly spread from start to end")
    add("--samples", type=positive, default=32, help="questions per length, depth and seed")
    add("--chunk-size", type=positive, default=8, help="tokens between two writes of a memory")
    add("--steps", type=positive, default=4000, help="most updates of a run")
    add("--stop-at", type=float, default=0.99, help="accuracy that ends a run; above 1: none does")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])


def plan(options: Options) -> dict[str, list[Run]]:
    """A row per model, a run per seed. Raises ValueError for a length without room for the needles."""
    needle_sample(options.length, random.Random(0), None, options.needles)
    base = HopeConfig(
        vocab_size=len(WORDS),
        dim=64,
        num_layers=2,
        num_heads=2,
        chunk_size=options.chunk_size,
    )
    most = max(1, options.depths - 1)
    run = NeedleRun(
        model=base,
        length=options.length,
        needles=options.needles,
        multiples=tuple(options.multiples),
        depths=tuple(i / most for i in range(options.depths)),
        samples=options.samples,
        steps=options.steps,
        stop_at=options.stop_at,
    )
    rows: dict[str, list[Run]] = {}
    for row in dict.fromkeys(options.models):
        model = build_row(row, base)
        if model.mixer == "sliding_attention":
            model.window = options.length
        rows[row_label(row)] = [replace(run, model=model, seed=seed) for seed in options.seeds]
    return rows


def report(options: Options, outcome: Outcome) -> Report:
    """Accuracy by length over all depths and seeds with its interval, and the map of every model."""
    lengths = [options.length * times for times in options.multiples]
    header = ["model", "parameters", "steps", *(f"{length} tokens" for length in lengths), "worst seed"]
    rows, numbers = [], []
    maps: dict[str, list[list[float]]] = {}
    for name, cells in outcome.items():
        right = [[sum(values) for values in zip(*by_depth, strict=True)] for by_depth in _by_length(cells)]
        asked = options.samples * len(cells)
        maps[name] = [[count / asked for count in row] for row in right]
        steps = [result["steps"] for _, result in cells]
        totals = [(sum(row), asked * len(row)) for row in right]
        parameters = cells[0][1]["parameters"]
        shown = [_with_interval(*total) for total in totals]
        row = {"model": name, "seeds": options.seeds, "steps": steps, "parameters": parameters}
        row["moved"] = _moved(cells)
        seeds = [[sum(values) for values in result["right"]] for _, result in cells]
        worst = min(seed[-1] for seed in seeds) / (options.samples * len(right[-1]))
        rows.append([name, f"{parameters:,}", ", ".join(map(str, steps)), *shown, f"{worst:.3f}"])
        numbers.append(
            {**row, "lengths": lengths, "map": maps[name], "right": totals, "right_by_seed": seeds}
        )
    depths = next(iter(outcome.values()))[0][0].depths
    return Report(
        title="A needle in a haystack beyond the training length",
        header=header,
        rows=rows,
        numbers=numbers,
        notes=_notes(options, outcome),
        picture=partial(draw_maps, maps, lengths, depths),
    )


def _by_length(cells: list[tuple[Any, Result]]) -> Iterator[tuple[list[int], ...]]:
    """For every length the counts of all seeds by depth."""
    return zip(*(result["right"] for _, result in cells), strict=True)


def _moved(cells: list[tuple[Any, Result]]) -> dict[str, list[float]]:
    """How far every memory moves, by length: the mean over seeds."""
    results = [result["moved"] for _, result in cells]
    return {
        name: [statistics.fmean(values) for values in zip(*(moved[name] for moved in results), strict=True)]
        for name in results[0]
    }


def _movement(outcome: Outcome) -> list[str]:
    """A remark for every model with memories: how far each has moved at every length."""
    return [
        f"{name}: "
        + "; ".join(
            f"M_{memory} {', '.join(f'{x:.2f}' for x in away)}" for memory, away in _moved(cells).items()
        )
        for name, cells in outcome.items()
        if cells[0][1]["moved"]
    ]


def _with_interval(right: int, asked: int) -> str:
    low, high = wilson(right, asked)
    return f"{right / asked:.3f} ({low:.3f}–{high:.3f})"


def _notes(options: Options, outcome: Outcome) -> list[str]:
    run: NeedleRun = next(iter(outcome.values()))[0][0]
    asked = options.samples * options.depths * len(options.seeds)
    failed = [
        name
        for name, cells in outcome.items()
        for _, result in cells
        if sum(result["right"][0]) < TARGET * options.samples * options.depths
    ]
    model = run.model
    return [
        f"Trained at {run.length} tokens, answer included, with {run.needles} needle(s) at random depths: "
        f"width {model.dim}, {model.num_layers} layers, chunk {model.chunk_size}, window {options.length}, "
        f"batch {run.batch_size}, AdamW {run.optim.lr:g}. At most {run.steps} steps; a run stops at a "
        f"held-out accuracy of {run.stop_at}. Steps are listed per seed.",
        f"An answer is right if all {ANSWER} digits are, generated greedily; chance is "
        f"{len(DIGITS) ** -ANSWER:g}. Mean over {options.depths} depths and seeds {options.seeds}, {asked} "
        "questions per length, with Wilson's 95 % interval (as if questions were independent; seeds differ "
        "by more).",
        f"Runs below {TARGET} at the training length: {'; '.join(failed) or 'none'}. Worst seed: at "
        "the longest length.",
        "How far memories move while they read, ‖W − W₀‖ / ‖W₀‖ at every length, mean over blocks and seeds:",
        *_movement(outcome),
    ]


EXPERIMENT = Experiment(
    name="needle",
    help="a needle in a haystack at 1 to 8 times the training length, and how far memories move",
    add_options=add_options,
    quick={"steps": 3, "seeds": [0], "multiples": [1, 2], "depths": 2, "samples": 4},
    plan=plan,
    report=report,
)
