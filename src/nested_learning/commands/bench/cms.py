"""What fast levels cost: a training step with two of them over one of the same model with a plain MLP.

uv run nl bench cms
uv run nl bench cms --mixer attention --chunks 64 256 --repeats 9

The two levels together have as many hidden units as the MLP they replace; `--equal-parameters` makes them
wider, until they have as many parameters. Every round runs all models once; times are those of the process.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

from nested_learning.bench.timing import spread
from nested_learning.command import Parser
from nested_learning.layers.mixer import MIXERS
from nested_learning.layers.mlp import swiglu_width
from nested_learning.levels import LevelSpec
from nested_learning.models.config import HopeConfig
from nested_learning.models.lm import HopeLM
from nested_learning.runtime import keep_freed_memory
from nested_learning.train.objective import next_token_loss

NUMBERS = {"dim": 256, "layers": 4, "heads": 4, "vocab": 512, "length": 1024, "batch": 4, "repeats": 5}


def parser() -> Parser:
    """Options, with the sizes of `speed.py` as defaults."""
    made = Parser(description=__doc__)
    for name, default in NUMBERS.items():
        made.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    made.add_argument("--threads", type=int, default=1, help="default 1")
    made.add_argument("--chunks", type=int, nargs="+", default=[32, 128], help="default 32 128")
    made.add_argument("--mixer", choices=MIXERS, default="self_mod")
    made.add_argument("--equal-parameters", action="store_true", help="instead of equal hidden width")
    return made


def step(levels: tuple[LevelSpec, ...], options: argparse.Namespace) -> tuple[Callable[[], None], int]:
    """A training step (forward, loss, backward) of a model with these levels, and its parameters."""
    torch.manual_seed(0)
    config = HopeConfig(
        vocab_size=options.vocab,
        dim=options.dim,
        num_layers=options.layers,
        num_heads=options.heads,
        mixer=options.mixer,
        levels=levels,
    )
    model = HopeLM(config)
    tokens = torch.randint(options.vocab, (options.batch, options.length + 1))

    def run() -> None:
        model.zero_grad(set_to_none=True)
        loss = next_token_loss(model(tokens[:, :-1])[0], tokens[:, 1:])
        loss.backward()  # type: ignore[no-untyped-call]

    return run, sum(p.numel() for p in model.parameters())


def main() -> None:
    """Measure and print."""
    options = parser().parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    hidden = swiglu_width(options.dim) * (1.5 if options.equal_parameters else 1)
    share = hidden / options.dim / len(options.chunks)
    fast = tuple(LevelSpec(name=f"every {c}", chunk_size=c, expansion=share) for c in options.chunks)
    runs = {"plain": step((LevelSpec(),), options), "fast": step(fast, options)}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(options.repeats + 1):
        for name, (run, _) in runs.items():
            start = time.process_time()
            run()
            if round_:
                seconds[name].append(time.process_time() - start)
    for name, (_, parameters) in runs.items():
        taken = spread(seconds[name])
        print(f"{name:5}  {parameters / 1e6:.2f} M parameters, {taken.median:.3f} s per step")
    ratio = spread([b / a for a, b in zip(seconds["plain"], seconds["fast"], strict=True)])
    print(f"fast / plain: min {ratio.min:.3f}, median {ratio.median:.3f}, max {ratio.max:.3f}")
