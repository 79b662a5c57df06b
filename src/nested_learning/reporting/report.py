"""What a path holds, and the page for it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nested_learning.checks import did_you_mean
from nested_learning.reporting.evaluations import find_evaluations
from nested_learning.reporting.experiment import NUMBERS, RUNS, collect_experiment
from nested_learning.reporting.pages import comparison_page, experiment_page, run_page
from nested_learning.reporting.run import CONFIG, METRICS, collect_run
from nested_learning.reporting.samples import write_samples

MOST_NAMED = 8


def run_report(path: str | Path, samples: bool = True) -> str:
    """The page of one run directory, or of one folder of `nl reproduce`, as HTML.

    Args:
        path: the folder. The run may be under way or broken off.
        samples: whether the kept checkpoints write a text each.

    Raises:
        ValueError: the folder is neither.
    """
    return report([path], samples)


def report(paths: Sequence[str | Path], samples: bool = True) -> str:
    """The page of one folder as `run_report` makes it, or of several runs side by side.

    Args:
        paths: run directories, or one folder of `nl reproduce`.
        samples: see `run_report`. A page of several runs has none.

    Raises:
        ValueError: no path, the same one twice, one that is neither, or an experiment beside something else.
    """
    folders = [Path(path) for path in paths]
    if not folders:
        raise ValueError("report needs at least one run directory")
    kinds = [kind_of(folder) for folder in folders]
    if len(folders) > 1:
        return comparison_page([collect_run(folder) for folder in several(folders, kinds)])
    if kinds[0] == "experiment":
        return experiment_page(collect_experiment(folders[0]))
    record = collect_run(folders[0])
    written = write_samples(record) if samples else None
    return run_page(record, find_evaluations(record), written)


def several(folders: Sequence[Path], kinds: Sequence[str]) -> Sequence[Path]:
    """`folders`, all different and all of runs; else ValueError."""
    for number, (folder, kind) in enumerate(zip(folders, kinds, strict=True)):
        if kind != "run":
            raise ValueError(f"{folder} is an experiment; give it alone, only runs go on one page")
        if folder.resolve() in [other.resolve() for other in folders[:number]]:
            raise ValueError(f"{folder} is given twice; every run must be given once")
    return folders


def kind_of(folder: Path) -> str:
    """ "run" or "experiment".

    Raises:
        ValueError: neither; the message names the nearest run, or those in the folder.
    """
    if (folder / CONFIG).is_file() or (folder / METRICS).is_file():
        return "run"
    if (folder / RUNS).is_file() or (folder / NUMBERS).is_file():
        return "experiment"
    if folder.is_dir():
        inside = [str(path) for path in folders_in(folder)]
        hint = f"; there are {_listed(inside)}" if inside else f" (it has no {CONFIG} and no {METRICS})"
        raise ValueError(f"{folder} is no run{hint}")
    what = "is a file" if folder.exists() else "does not exist"
    beside = [path.name for path in folders_in(folder.parent)]
    near = did_you_mean(folder.name, beside)
    there = f"; in {folder.parent} there are {_listed(beside)}" if beside and not near else ""
    raise ValueError(f"a run must be a run directory, got {folder}, which {what}{near}{there}")


def folders_in(folder: Path) -> list[Path]:
    """Runs and experiments right in `folder`, or one folder further down (a sweep), by name."""
    if not folder.is_dir():
        return []
    marks = {path.parent for name in (CONFIG, METRICS, RUNS) for path in folder.glob(f"*/{name}")}
    deeper = {path.parent for name in (CONFIG, METRICS, RUNS) for path in folder.glob(f"*/*/{name}")}
    return sorted(marks) or sorted(deeper)


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more
