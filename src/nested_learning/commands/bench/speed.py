"""Speed and memory of the mixers against a plain Transformer.

uv run nl bench speed --output results/speed
uv run nl bench speed --smoke --output outputs/speed
uv run nl bench speed --lengths 1024 16384:1 --mixers self_mod --output outputs/long
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

from nested_learning.bench.report import write_report
from nested_learning.bench.run import run_benchmark
from nested_learning.bench.settings import PARTS, PRECISIONS, BenchSettings, smoke_settings
from nested_learning.command import Parser
from nested_learning.layers.mixer import MIXERS

NUMBERS = (
    "dim layers heads vocab chunk batch repeats threads keep_every decode_batch yardstick_max_position "
    "peer_length"
)
LISTS = "decode_positions peer_chunks"


def length_and_batch(text: str) -> tuple[int, int | None]:
    """`1024` or, with its own batch, `16384:1`."""
    length, _, batch = text.partition(":")
    try:
        return int(length), int(batch) if batch else None
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be T or T:BATCH, whole numbers, got {text!r}") from None


def parser() -> Parser:
    """Options that are not given keep the defaults of `BenchSettings` (or of its smoke variant)."""
    made = Parser(description=__doc__)
    add = made.add_argument
    missing = argparse.SUPPRESS
    defaults = BenchSettings()
    for names, nargs in ((NUMBERS, None), (LISTS, "+")):
        for name in names.split():
            text = f"default {getattr(defaults, name)}"
            add(f"--{name.replace('_', '-')}", type=int, nargs=nargs, default=missing, help=text)
    lengths = "tokens per sequence, each as T or T:BATCH (default 1024 4096 16384:1)"
    add("--lengths", type=length_and_batch, nargs="+", default=missing, help=lengths)
    add("--mixers", nargs="+", choices=MIXERS, default=missing)
    add("--parts", nargs="+", choices=PARTS, default=missing)
    add("--precision", choices=PRECISIONS, default=missing)
    add("--peer-expansion", type=float, default=missing, help="hidden width over head width, default 1")
    add("--device", default=missing)
    add("--compile", action="store_true", default=missing)
    add("--optimizer", action="store_true", default=missing, help="include AdamW's step")
    add("--skip-titans-pytorch", dest="peer", action="store_false", default=missing)
    add("--smoke", action="store_true", help="tiny models, a few seconds; the figures mean nothing")
    files = "folder for speed.json, speed.md and speed.png, default outputs/speed"
    add("--output", type=Path, default=Path("outputs/speed"), help=files)
    return made


def main() -> None:
    """Parse, run, write."""
    options = vars(parser().parse_args())
    output, smoke = options.pop("output"), options.pop("smoke")
    settings = replace(smoke_settings() if smoke else BenchSettings(), **options)
    start = time.monotonic()

    def progress(message: str) -> None:
        print(f"[{time.monotonic() - start:7.1f} s] {message}", file=sys.stderr, flush=True)

    print(write_report(run_benchmark(settings, progress), output))
