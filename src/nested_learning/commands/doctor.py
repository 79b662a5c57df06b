"""Versions, device, packages, bundled text and speed of this machine.

uv run nl doctor

With a CUDA card also what that is and can do, which kernels are used there, and whether each of them compiles
and computes what its token loop does.

Exit status 1 if something that is needed is missing or damaged.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import re
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import torch

from nested_learning.bench.card import report
from nested_learning.command import Parser
from nested_learning.data.corpus import bundled_files, default_cache_dir
from nested_learning.extras import DISTRIBUTION, EXTRAS, own_version
from nested_learning.runtime import pick_device

REQUIRED = (
    *("numpy", "hydra", "omegaconf", "sentencepiece", "datasets", "pyarrow", "datasketch"),
    *("wandb", "tqdm", "matplotlib"),
)
DISTRIBUTIONS = {"hydra": "hydra-core"}


def main() -> int:
    """Print what matters about this machine and return 1 if something needed is missing or damaged."""
    Parser(description=__doc__).parse_args()
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
    lines, wrong = report(pick_device("auto"))
    problems += wrong
    print("\n".join(lines))
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
