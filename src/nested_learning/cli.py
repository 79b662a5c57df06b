"""The `nl` command: `nl doctor` looks at the machine, `nl reproduce` makes the tables of the docs."""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import platform
import re
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import torch

from nested_learning import audit, plan
from nested_learning.command import DEBUG, Parser, run_command
from nested_learning.data.corpus import bundled_files, default_cache_dir
from nested_learning.extras import DISTRIBUTION, EXTRAS, own_version
from nested_learning.reproduce import EXPERIMENTS
from nested_learning.train.checkpoint import commands as checkpoints

REQUIRED = (
    *("numpy", "hydra", "omegaconf", "sentencepiece", "datasets", "pyarrow", "datasketch"),
    *("wandb", "tqdm", "matplotlib"),
)
DISTRIBUTIONS = {"hydra": "hydra-core"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code is that of `run_command`.

    Every subcommand sets `run`, a function from its options to the exit code.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)

    def run() -> int:
        options = build_parser().parse_args(given)
        code: int = options.run(options)
        return code

    return run_command("nl", run, debug=DEBUG in given)


def build_parser() -> Parser:
    """The parser of the whole command."""
    parser = Parser(prog="nl", description="Nested Learning")
    commands = parser.add_subparsers(dest="command", required=True)
    doctor_parser = commands.add_parser("doctor", help="versions, device, packages, bundled text, speed")
    doctor_parser.set_defaults(run=lambda options: doctor())
    audit.add_to(commands.add_parser("audit", help="which level updates when, by plan and in a real step"))
    plan.add_to(commands.add_parser("plan", help="memory, speed, days and checkpoint size of a run on GPUs"))
    checkpoints.add_verify_to(commands.add_parser("verify-checkpoint", help="compare files with checksums"))
    checkpoints.add_export_to(commands.add_parser("export", help="a checkpoint as one safetensors file"))
    reproduce = commands.add_parser("reproduce", help="run an experiment and print its table")
    names = reproduce.add_subparsers(dest="name", required=True)
    for experiment in EXPERIMENTS:
        defaults = argparse.ArgumentDefaultsHelpFormatter
        one = names.add_parser(experiment.name, help=experiment.help, formatter_class=defaults)
        experiment.add_to(one)
        one.set_defaults(experiment=experiment, run=run_experiment)
    return parser


def run_experiment(options: argparse.Namespace) -> int:
    """Run the chosen experiment; 130 if it was interrupted."""
    plan = options.experiment.prepare(options)
    try:
        options.experiment.run(options, plan)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on with the runs that are not finished", file=sys.stderr)
        return 130
    return 0


def doctor() -> int:
    """Print what matters about this machine; 1 if something needed is missing or damaged."""
    problems: list[str] = []
    print(f"{DISTRIBUTION} {own_version()}, Python {platform.python_version()}, torch {torch.__version__}")
    print(f"device    {describe_device()}")
    for name in REQUIRED:
        line, ok = check_import(name)
        print(f"package   {line}")
        problems += [] if ok else [line]
    for name, extra in EXTRAS.items():
        found = importlib.util.find_spec(name) is not None
        print(f"optional  {name}: " + ("installed" if found else f"not installed (extra {extra!r})"))
    wrong = check_text(bundled_files())
    problems += wrong
    print("text      " + ("; ".join(wrong) or f"{len(bundled_files())} bundled files, SHA-256 right"))
    print(f"cache     {default_cache_dir()}")
    print(f"matmul    {matmul_rate():.0f} GFLOP/s (float32, 1024 x 1024 x 1024)")
    print("\n".join(["", "problems:", *problems]) if problems else "\nall good")
    return 1 if problems else 0


def describe_device() -> str:
    """CPU cores and threads, and the CUDA devices."""
    cpu = f"cpu, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    names = [f"{card.name}, {card.total_memory / 2**30:.0f} GiB" for card in cards]
    return "; ".join([cpu, *(names or ["no CUDA"])])


def check_import(name: str) -> tuple[str, bool]:
    """Import a package: a line about it, and whether it worked."""
    try:
        importlib.import_module(name)
    except ImportError as error:
        return f"{name}: {error}", False
    return f"{name} {metadata.version(DISTRIBUTIONS.get(name, name))}", True


def check_text(files: Sequence[Path]) -> list[str]:
    """What is wrong with text files, by the SHA-256 in the README.md beside them; nothing if all is well."""
    if not files:
        return ["no bundled text"]
    readme = (files[0].parent / "README.md").read_text(encoding="utf-8")
    expected = {name: digest for digest, name in re.findall(r"([0-9a-f]{64})  (\S+)", readme)}
    actual = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    missing = [f"{name} is missing" for name in expected.keys() - actual.keys()]
    changed = [f"{name} has another SHA-256" for name in actual if actual[name] != expected.get(name)]
    return sorted(missing) + changed


def matmul_rate(size: int = 1024, repeats: int = 5) -> float:
    """Best rate of a float32 product of `size x size` matrices on the CPU, in 1e9 operations per second."""
    a = torch.randn(size, size)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        torch.mm(a, a)
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds) / 1e9


if __name__ == "__main__":
    sys.exit(main())
