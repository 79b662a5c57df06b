"""Versions, device, packages, bundled text and speed of this machine.

uv run nl doctor
uv run nl doctor --json

With a CUDA card also what that is and can do, which kernels are used there, and whether each of them compiles
and computes what its token loop does.

Exit status 1 if something that is needed is missing or damaged.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import platform
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path

import torch

from nested_learning.bench.card import report
from nested_learning.command import Parser
from nested_learning.data.corpus import bundled_files, default_cache_dir
from nested_learning.extras import DISTRIBUTION, EXTRAS, own_version
from nested_learning.home import config_folder
from nested_learning.runtime import pick_device

REQUIRED = (
    *("numpy", "hydra", "omegaconf", "sentencepiece", "datasets", "pyarrow", "datasketch"),
    *("wandb", "tqdm", "matplotlib"),
)
DISTRIBUTIONS = {"hydra": "hydra-core"}


@dataclass(kw_only=True)
class Findings:
    """What was found out about this machine; `problems` are what is needed and missing or damaged."""

    distribution: str
    version: str
    python: str
    torch: str
    device: str
    packages: dict[str, str] = field(default_factory=dict)
    optional: dict[str, bool] = field(default_factory=dict)
    text: str = ""
    configurations: str = ""
    cache: str = ""
    matmul_gflops: float = 0.0
    card: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def main() -> int:
    """Print what matters about this machine and return 1 if something needed is missing or damaged."""
    parser = Parser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print it as one JSON object")
    options = parser.parse_args()
    found = examine()
    print(json.dumps(asdict(found), indent=2) if options.json else show(found))
    return 1 if found.problems else 0


def examine() -> Findings:
    """Look at packages, files and devices."""
    found = Findings(
        distribution=DISTRIBUTION,
        version=own_version(),
        python=platform.python_version(),
        torch=torch.__version__,
        device=describe_device(),
    )
    for name in REQUIRED:
        found.packages[name], ok = check_import(name)
        found.problems += [] if ok else [f"{name}: {found.packages[name]}"]
    found.optional = {name: importlib.util.find_spec(name) is not None for name in EXTRAS}
    wrong = check_text(bundled_files())
    found.text = "; ".join(wrong) or f"{len(bundled_files())} bundled files, SHA-256 right"
    found.problems += wrong
    try:
        found.configurations = str(config_folder())
    except FileNotFoundError as error:
        found.problems.append(str(error))
    found.cache = str(default_cache_dir())
    found.matmul_gflops = round(matmul_rate(), 1)
    found.card, wrong = report(pick_device("auto"))
    found.problems += wrong
    return found


def show(found: Findings) -> str:
    """The same for people."""
    lines = [f"{found.distribution} {found.version}, Python {found.python}, torch {found.torch}"]
    lines.append(f"device    {found.device}")
    lines += [f"package   {name} {version}" for name, version in found.packages.items()]
    for name, there in found.optional.items():
        lines.append(
            f"optional  {name}: " + ("installed" if there else f"not installed (extra {EXTRAS[name]!r})")
        )
    lines.append(f"text      {found.text}")
    lines.append(f"configs   {found.configurations or 'missing'}")
    lines.append(f"cache     {found.cache}")
    lines.append(f"matmul    {found.matmul_gflops:.0f} GFLOP/s (float32, 1024 x 1024 x 1024)")
    lines += found.card
    lines += ["", "problems:", *found.problems] if found.problems else ["", "all good"]
    return "\n".join(lines)


def describe_device() -> str:
    """CPU cores and threads, and the CUDA devices."""
    cpu = f"cpu, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    names = [f"{card.name}, {card.total_memory / 2**30:.0f} GiB" for card in cards]
    return "; ".join([cpu, *(names or ["no CUDA"])])


def check_import(name: str) -> tuple[str, bool]:
    """Import a package: its version, or why not; and whether it worked."""
    try:
        importlib.import_module(name)
    except ImportError as error:
        return str(error), False
    return metadata.version(DISTRIBUTIONS.get(name, name)), True


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
