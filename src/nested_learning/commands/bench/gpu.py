"""Everything about one GPU in some minutes: kernels checked, speed, memory, a profile, two training runs.

uv run nl bench gpu --output results/gpu
uv run nl bench gpu --stages kernels speed --minutes 5 --output results/gpu
uv run nl bench gpu --smoke --output outputs/gpu_smoke

Every result is on disk as soon as it is there; the same command goes on where the last one ended.
`scripts/bench/gpu.sh` runs the stages in processes of their own.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from dataclasses import replace
from pathlib import Path

from nested_learning.bench.gpu import FILE, STAGES, run_gpu
from nested_learning.bench.gpu_settings import ARMS, PARTS, PEERS, GpuSettings, smoke_settings
from nested_learning.bench.settings import PRECISIONS
from nested_learning.command import Parser
from nested_learning.runtime import keep_freed_memory

LISTS = {"lengths": "tokens per sequence", "positions": "tokens read before decoding is timed"}
NUMBERS = {
    "tokens": "tokens of a step, at every length",
    "repeats": "timed rounds",
    "pilot_steps": "most steps of the two training runs",
}
MINUTES, PILOT_MINUTES = 8.0, 2.5


def parser() -> Parser:
    """Options that are not given keep the defaults of `GpuSettings` (or of its smoke variant)."""
    made = Parser(description=__doc__)
    add, defaults = made.add_argument, GpuSettings(device="cpu")
    missing = argparse.SUPPRESS
    for names, nargs in ((LISTS, "+"), (NUMBERS, None)):
        for name, text in names.items():
            help = f"{text}, default {getattr(defaults, name)}"
            add(f"--{name.replace('_', '-')}", type=int, nargs=nargs, default=missing, help=help)
    add("--models", nargs="+", choices=[*ARMS, *PEERS], default=missing, help="beside the Transformer")
    add("--parts", nargs="+", choices=PARTS, default=missing, help="what is timed, default everything")
    add("--overrides", nargs="+", default=missing, help="of configs/pilot.yaml, such as model.num_layers=4")
    add("--precision", choices=PRECISIONS, default=missing)
    add("--device", default=missing, help="default auto")
    add("--no-compile", dest="compile", action="store_false", default=missing)
    add("--stages", nargs="+", choices=STAGES, default=STAGES, help="default all")
    add("--minutes", type=float, default=MINUTES, help=f"for all stages, default {MINUTES:g}")
    kept = f"of these, kept for the training runs, default {PILOT_MINUTES:g}"
    add("--pilot-minutes", type=float, default=PILOT_MINUTES, help=kept)
    add("--smoke", action="store_true", help="tiny models on the CPU; the figures mean nothing")
    add("--again", action="store_true", help="measure everything again")
    add("--output", type=Path, default=Path("outputs/gpu"), help="folder, default outputs/gpu")
    return made


def main() -> int:
    """Parse, measure, write; status 1 if a kernel is wrong or a measurement failed."""
    options = vars(parser().parse_args())
    output, smoke, again = (options.pop(name) for name in ("output", "smoke", "again"))
    stages, minutes, kept = (options.pop(name) for name in ("stages", "minutes", "pilot_minutes"))
    settings = replace(smoke_settings() if smoke else GpuSettings(), **options)
    if again:
        (output / FILE).unlink(missing_ok=True)
    keep_freed_memory()
    gc.freeze()  # what is loaded by now stays; every collection between two rounds would look through it
    start = time.monotonic()

    def progress(message: str) -> None:
        print(f"[{time.monotonic() - start:7.1f} s] {message}", file=sys.stderr, flush=True)

    text, well = run_gpu(settings, output, tuple(stages), minutes, kept, progress)
    print(text)
    return 0 if well else 1
