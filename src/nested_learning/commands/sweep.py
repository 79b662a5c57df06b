"""The table of a sweep (`train.py -m seed=0,1,2`): a row for every job, with what it ended with."""

from __future__ import annotations

import csv
import io
import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig

from nested_learning.commands.train import JobFailed
from nested_learning.report import markdown_table
from nested_learning.train.checkpoint import write_atomic
from nested_learning.train.metrics import read_metrics
from nested_learning.train.plots import plot_jobs

COLUMNS = ("validation loss", "bits/byte", "steps", "seconds", "status")


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One job of a sweep.

    Args:
        overrides: field or group → value, as on the command line.
        run_dir: its run directory.
        seconds: of this start; a run that goes on has had others.
        failed: whether it stopped with an error; stderr has said with which.
    """

    overrides: dict[str, str]
    run_dir: Path
    seconds: float
    failed: bool = False

    def results(self) -> list[str]:
        """The values of `COLUMNS`, from the metrics in its run directory."""
        last: dict[str, float] = {}
        for row in read_metrics(self.run_dir / "metrics.jsonl"):
            last |= row
        loss, bits = (last.get(key, math.nan) for key in ("valid_loss", "valid_bits_per_byte"))
        numbers = ["" if math.isnan(value) else f"{value:.4f}" for value in (loss, bits)]
        steps, status = f"{last.get('step', 0):.0f}", "failed" if self.failed else "done"
        return [*numbers, steps, f"{self.seconds:.1f}", status]


class SweepTable(Callback):
    """Hydra's callback that keeps `sweep.md`, `sweep.csv` and `sweep.png` in the sweep's folder.

    They are written anew after every job, so that a sweep that is killed leaves those of the jobs that it
    had. At the end the table is printed, and the process ends with the status of the first job that failed,
    if any did. Of several processes, only the main one writes and prints.
    """

    def __init__(self) -> None:
        self.jobs: list[Job] = []
        self.folders: list[str] = []
        self.started, self.status = 0.0, 0

    @property
    def folder(self) -> Path:
        """Of the sweep: what its jobs are in, whatever it varies."""
        return Path(os.path.commonpath(self.folders))

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Start the clock."""
        self.started = time.monotonic()

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Add the job, and write what there is."""
        if config.hydra.mode != RunMode.MULTIRUN:
            return
        failed = job_return.status == JobStatus.FAILED
        if failed and isinstance(error := job_return._return_value, JobFailed):
            self.status = self.status or error.status
            job_return.status = JobStatus.COMPLETED  # else Hydra ends the sweep without calling its end
        if not _is_main():
            return
        own: Any = job_return.cfg
        self.jobs.append(
            Job(
                overrides=dict(text.split("=", 1) for text in job_return.overrides or () if "=" in text),
                run_dir=Path(own.train.output_dir) / own.name,
                seconds=time.monotonic() - self.started,
                failed=failed,
            )
        )
        self.folders.append(str(config.hydra.sweep.dir))
        write_table(self.jobs, self.folder)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Print the table."""
        if self.jobs:
            print(f"\n{markdown(self.jobs)}\nthe table is in {self.folder / 'sweep.md'}")
        if self.status:
            sys.exit(self.status)


def differences(jobs: Sequence[Job]) -> tuple[list[str], list[list[str]]]:
    """Names of what differs between jobs, and its values for each of them; of one job, all it was given."""
    keys = dict.fromkeys(key for job in jobs for key in job.overrides)
    rows = {key: [job.overrides.get(key, "") for job in jobs] for key in keys}
    names = [key for key, values in rows.items() if len(set(values)) > 1 or len(jobs) == 1]
    return names, [[rows[name][number] for name in names] for number in range(len(jobs))]


def markdown(jobs: Sequence[Job]) -> str:
    """The table of `jobs`."""
    names, values = differences(jobs)
    rows = [[*own, *job.results()] for own, job in zip(values, jobs, strict=True)]
    return markdown_table([*names, *COLUMNS], rows)


def write_table(jobs: Sequence[Job], folder: Path) -> None:
    """Write `sweep.md`, `sweep.csv` and the curves, `sweep.png`, to `folder`."""
    names, values = differences(jobs)
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow([*names, *COLUMNS, "run"])
    for own, job in zip(values, jobs, strict=True):
        rows.writerow([*own, *job.results(), job.run_dir])
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "sweep.csv", text.getvalue().encode())
    write_atomic(folder / "sweep.md", markdown(jobs).encode())
    curves = {os.path.relpath(job.run_dir, folder.parent): job.run_dir / "metrics.jsonl" for job in jobs}
    try:
        plot_jobs(curves, folder / "sweep.png")
    except Exception as error:  # of any kind, from the plotting library; the table is there
        print(f"no plot: {type(error).__name__}: {error}", file=sys.stderr)


def _is_main() -> bool:
    return int(os.environ.get("RANK", 0)) == 0
