"""Result files of one schema, for every evaluation; metrics with their intervals; a table of results.

    write_result(path, EvaluationResult(…, metrics=[proportion("piqa", "acc", 12, 20)], …))
    print(summarise([path, …]))  # a Markdown table

A result file holds no times, so that an evaluation that was killed and resumed writes the same bytes.
"""

from __future__ import annotations

import json
import math
import platform
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from nested_learning.checks import one_of
from nested_learning.data.records import read_json
from nested_learning.eval.arms import ARMS, BASELINE
from nested_learning.extras import own_version
from nested_learning.report import markdown_table
from nested_learning.train.checkpoint import write_atomic

Z = 1.959963984540054  # 97.5 % quantile of the normal distribution


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    """One number of an evaluation.

    Args:
        task, name: such as "piqa" and "acc".
        value: the number.
        low, high: its 95 % interval (Wilson's for proportions, otherwise normal); None if there is none.
        stderr: standard error of a mean of n samples, with n - 1 in the denominator; None for one sample.
        n: number of samples.
        chance: the value that guessing would give; None where that has no meaning.
        arm: one of `arms.ARMS`.
    """

    task: str
    name: str
    value: float
    low: float | None = None
    high: float | None = None
    stderr: float | None = None
    n: int = 1
    chance: float | None = None
    arm: str = BASELINE

    def __post_init__(self) -> None:
        one_of("arm", self.arm, ARMS)


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationResult:
    """The content of a result file.

    Args:
        evaluation: such as "zeroshot".
        checkpoint: `Loaded.describe()`; for several checkpoints, their paths and SHA-256.
        settings: everything that the numbers depend on, as JSON values.
        versions: from `versions()`.
        metrics: the numbers.
        samples: number of samples that were scored.
    """

    evaluation: str
    checkpoint: Mapping[str, str]
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    metrics: Sequence[Metric]
    samples: int


def versions(*packages: str) -> dict[str, str]:
    """Versions of Python, torch, this package, its git commit, and of further `packages`."""
    named = {name: metadata.version(name) for name in packages}
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "nested_learning": own_version(),
        "git": _git_commit(),
        **named,
    }


def _git_commit() -> str:
    """Commit of the repository this package is run from; "unknown" for an installed package."""
    folder = Path(__file__).parent
    command = ["git", "-C", str(folder), "rev-parse", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        tracked = ["git", "-C", str(folder), "ls-files", "--error-unmatch", "results.py"]
        subprocess.run(tracked, capture_output=True, check=True)  # not the repository of someone's project
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found


def wilson(successes: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a proportion.

    Raises:
        ValueError: no samples, or successes outside of 0 to n.
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"successes must be between 0 and n >= 1, got {successes} of {n}")
    p, spread = successes / n, Z * Z / n
    middle = (p + spread / 2) / (1 + spread)
    half = Z * math.sqrt(p * (1 - p) / n + spread / (4 * n)) / (1 + spread)
    low, high = max(0.0, middle - half), min(1.0, middle + half)
    return (0.0 if successes == 0 else low), (1.0 if successes == n else high)


def proportion(
    task: str, name: str, successes: float, n: int, chance: float | None = None, arm: str = BASELINE
) -> Metric:
    """A proportion as a metric; `successes` may be a sum of fractions between 0 and 1, one per sample."""
    low, high = wilson(successes, n)
    p = successes / n
    stderr = math.sqrt(p * (1 - p) / (n - 1)) if n > 1 else None
    return Metric(
        task=task, name=name, value=p, low=low, high=high, stderr=stderr, n=n, chance=chance, arm=arm
    )


def average(
    task: str, name: str, values: Sequence[float], chance: float | None = None, arm: str = BASELINE
) -> Metric:
    """The mean of one value per sample as a metric, with a normal interval.

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError(f"{task} {name}: values must not be empty")
    mean, n = statistics.fmean(values), len(values)
    stderr = statistics.stdev(values) / math.sqrt(n) if n > 1 else None
    low, high = (None, None) if stderr is None else (mean - Z * stderr, mean + Z * stderr)
    return Metric(
        task=task, name=name, value=mean, low=low, high=high, stderr=stderr, n=n, chance=chance, arm=arm
    )


def check_output(path: Path) -> None:
    """Raise ValueError unless `path` can be a result file."""
    if path.suffix != ".json":
        raise ValueError(f"output must end in .json, got {path}")


def write_result(path: Path, result: EvaluationResult) -> None:
    """Write a result file. At any moment the file is absent, old or complete.

    Raises:
        ValueError: a number that is not finite, or a suffix other than .json.
    """
    check_output(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(asdict(result), indent=1, allow_nan=False, ensure_ascii=False)
    write_atomic(path, (text + "\n").encode())


def read_result(path: str | Path) -> EvaluationResult:
    """Read what `write_result` wrote.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a result file.
    """
    content = read_json(path)
    names = {field.name for field in fields(EvaluationResult)}
    if not isinstance(content, dict) or content.keys() != names:
        raise ValueError(f"{path} is no result file: it must hold {', '.join(sorted(names))}")
    metrics = [Metric(**metric) for metric in content["metrics"]]
    return EvaluationResult(**{**content, "metrics": metrics})


def summarise(paths: Sequence[str | Path]) -> str:
    """One Markdown table of all metrics of result files.

    Raises:
        ValueError: no files, or one that is no result file.
    """
    if not paths:
        raise ValueError("no result files given")
    rows = []
    for result in map(read_result, paths):
        name = result.checkpoint.get("name") or ", ".join(result.checkpoint)
        rows += [[name, result.evaluation, *_cells(metric)] for metric in result.metrics]
    header = ["checkpoint", "evaluation", "task", "metric", "arm", "value", "95 % interval", "chance", "n"]
    return markdown_table(header, rows)


def _cells(metric: Metric) -> list[str]:
    chance = "" if metric.chance is None else f"{metric.chance:.4g}"
    return [
        metric.task,
        metric.name,
        metric.arm,
        f"{metric.value:.4f}",
        interval(metric),
        chance,
        str(metric.n),
    ]


def interval(metric: Metric) -> str:
    """The interval of a metric for a table; empty without one."""
    return "" if metric.low is None else f"{metric.low:.4f} to {metric.high:.4f}"
