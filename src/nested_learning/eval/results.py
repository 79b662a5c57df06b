"""What every evaluation leaves behind: a result file of one schema, and a log of its samples to go on from.

    rows = evaluate_samples(log, settings, [("0", item), …], score, "piqa")    # resumes
    write_result(path, Result(evaluation="zeroshot", …, metrics=[proportion("piqa", "acc", 12, 20)], …))
    print(summarise([path, …]))                                                # a Markdown table

A result file holds no times, so that an evaluation that was killed and run again gives the same bytes.
"""

from __future__ import annotations

import json
import math
import platform
import statistics
import subprocess
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, fields
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import torch

from nested_learning.data.records import read_json
from nested_learning.extras import own_version
from nested_learning.lock import LOCK, locked
from nested_learning.log_lines import read_log
from nested_learning.train.checkpoint import write_atomic

BASELINE, ADAPTED, GOLD = "baseline", "adapted", "adapted, gold text"
ARMS = (BASELINE, ADAPTED, GOLD)
Z = 1.959963984540054  # 97.5 % quantile of the normal distribution
Row = dict[str, Any]
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    """One number of an evaluation.

    Args:
        task, name: such as "piqa" and "acc".
        value: the number.
        low, high: its 95 % interval (Wilson's for proportions, else normal); None where there is none.
        stderr: standard error of a mean of n samples, with n - 1 in the denominator; None for one sample.
        n: samples.
        chance: what guessing would give; None where that has no meaning.
        arm: "baseline"; "adapted": the model has memorized what it was shown; "adapted, gold text": the right
            answers were part of that.
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
        if self.arm not in ARMS:
            raise ValueError(f"arm must be one of {', '.join(ARMS)}, got {self.arm!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """The result of an evaluation.

    Args:
        evaluation: such as "zeroshot".
        checkpoint: `Loaded.describe()`; for several, their paths with their SHA-256.
        settings: all that decides the numbers, as JSON values.
        versions: `versions()`.
        metrics: the numbers.
        samples: how many items were scored.
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


def write_result(path: Path, result: Result) -> None:
    """Write a result file; it is at all times absent, old or complete.

    Raises:
        ValueError: a number that is not finite, or a suffix other than .json.
    """
    if path.suffix != ".json":
        raise ValueError(f"output must end in .json, got {path}")
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(asdict(result), indent=1, allow_nan=False, ensure_ascii=False)
    write_atomic(path, (text + "\n").encode())


def read_result(path: str | Path) -> Result:
    """Read what `write_result` wrote.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a result file.
    """
    content = read_json(path)
    names = {field.name for field in fields(Result)}
    if not isinstance(content, dict) or content.keys() != names:
        raise ValueError(f"{path} is no result file: it must hold {', '.join(sorted(names))}")
    metrics = [Metric(**metric) for metric in content["metrics"]]
    return Result(**{**content, "metrics": metrics})


def summarise(paths: Sequence[str | Path]) -> str:
    """One Markdown table of all metrics of result files.

    Raises:
        ValueError: no files, or one that is no result file.
    """
    from nested_learning.report import markdown_table

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


def samples_path(output: Path) -> Path:
    """The log of samples beside a result file."""
    return output.with_suffix(".samples.jsonl")


def evaluate_samples(
    log_path: Path,
    settings: Mapping[str, Any],
    items: Sequence[tuple[str, T]],
    score: Callable[[T], Row],
    description: str = "",
    replay: Callable[[T], object] | None = None,
) -> list[Row]:
    """Score items one after the other and keep every finished one, so that a killed evaluation can go on.

    Args:
        log_path: a JSON-lines file: the settings, then `{"key", "result"}` per sample. A last line cut short
            by a kill is removed from it.
        settings: all that decides a sample's result, as JSON values.
        items: key and item; keys that the log holds are not scored again.
        score: from an item to JSON values.
        description: of the progress bar.
        replay: called for each item that is not scored again, in order: for what is carried from one sample
            to the next.

    Returns:
        Results in the order of `items`, as read back from JSON.

    Raises:
        InUseError: another process writes to the log.
        ValueError: the log was made with other settings, or two items have the same key.
    """
    return evaluate_batches(
        log_path, settings, items, lambda batch: [score(item) for item in batch], 1, description, replay
    )


def evaluate_batches(
    log_path: Path,
    settings: Mapping[str, Any],
    items: Sequence[tuple[str, T]],
    score: Callable[[Sequence[T]], Sequence[Row]],
    size: int,
    description: str = "",
    replay: Callable[[T], object] | None = None,
) -> list[Row]:
    """`evaluate_samples` with `score` for `size` items at once.

    Batches are the same after an interruption: one of which a sample is missing is scored again as a whole,
    so that not even rounding differs.
    """
    if len({key for key, _ in items}) != len(items):
        raise ValueError("every item needs a key of its own")
    with _locked_log(log_path):
        return _score_missing(log_path, settings, items, score, size, description, replay)


def _score_missing(
    log_path: Path,
    settings: Mapping[str, Any],
    items: Sequence[tuple[str, T]],
    score: Callable[[Sequence[T]], Sequence[Row]],
    size: int,
    description: str,
    replay: Callable[[T], object] | None,
) -> list[Row]:
    from tqdm import tqdm

    done = _open_log(log_path, settings)
    finished = sum(key in done for key, _ in items)
    bar = tqdm(total=len(items), initial=finished, desc=description, unit="sample", disable=None)
    with bar, log_path.open("a", encoding="utf-8") as log:
        for first in range(0, len(items), size):
            batch = items[first : first + size]
            missing = [key for key, _ in batch if key not in done]
            if not missing:
                if replay is not None:
                    for _, item in batch:
                        replay(item)
                continue
            for (key, _), row in zip(batch, score([item for _, item in batch]), strict=True):
                if key in done:
                    continue
                line = json.dumps({"key": key, "result": row}, allow_nan=False)
                log.write(line + "\n")
                log.flush()
                done[key] = json.loads(line)["result"]
            bar.update(len(missing))
    return [done[key] for key, _ in items]


def start_fresh(log_path: Path) -> None:
    """Delete the log of an earlier evaluation (`--fresh`). InUseError if it is still going on."""
    with _locked_log(log_path):
        log_path.unlink(missing_ok=True)


def _locked_log(path: Path) -> AbstractContextManager[None]:
    return locked(path.with_name(path.name + LOCK), f"log of samples {path}")


def _open_log(path: Path, settings: Mapping[str, Any]) -> dict[str, Row]:
    """Finished samples by key; begins the log if there is none."""
    wanted = json.loads(json.dumps(settings, allow_nan=False))
    lines, whole = read_log(path)
    if not lines and whole:
        write_atomic(path, (json.dumps({"settings": wanted}) + "\n").encode())
        return {}
    settings_line = lines[0].get("settings") if lines else None
    if settings_line != wanted:
        raise ValueError(
            f"{path} holds samples of another evaluation ({_difference(settings_line, wanted)}); "
            "give another --output, or --fresh to forget them"
        )
    if any("key" not in line or "result" not in line for line in lines[1:]):
        raise ValueError(f"{path} is no log of samples; give another --output, or --fresh to forget it")
    if not whole:
        write_atomic(path, "".join(json.dumps(line) + "\n" for line in lines).encode())
    return {line["key"]: line["result"] for line in lines[1:]}


def _difference(old: Any, new: dict[str, Any]) -> str:
    if not isinstance(old, dict):
        return "not a log of samples"
    keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    return "; ".join(f"{key} was {old.get(key)!r}, is {new.get(key)!r}" for key in keys)
