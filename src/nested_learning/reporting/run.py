"""What a run directory holds, read without changing it: finished, under way or broken off."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from omegaconf import DictConfig

from nested_learning.config_errors import plain_values
from nested_learning.lock import LOCK, in_use
from nested_learning.log_lines import Row
from nested_learning.models.bill import count_parameters
from nested_learning.train.checkpoint import CheckpointStore
from nested_learning.train.config import RunConfig, run_config
from nested_learning.train.metrics import Record, read_metrics
from nested_learning.train.starts import read_starts
from nested_learning.yaml_files import load_yaml

CONFIG, METRICS = "config.yaml", "metrics.jsonl"
FINISHED, RUNNING, STOPPED, UNKNOWN = "finished", "running", "unfinished", "unknown"
Points = list[tuple[float, float]]


@dataclass(frozen=True, kw_only=True, slots=True)
class RunRecord:
    """A run as its directory shows it.

    Args:
        path: the run directory.
        config: the configuration; None if there is none, or none that this version accepts.
        written: the text of `config.yaml`, "" without one.
        rows: of `metrics.jsonl`, oldest first.
        starts: of `starts.jsonl`, oldest first.
        checkpoints: folders that are kept, by step.
        best: the one with the lowest validation loss, if one was validated.
        sample: the text that the run wrote at its end; None before.
        running: whether a process holds the lock of the directory.
        missing: what was looked for and not found, a sentence each.
    """

    path: Path
    config: RunConfig | None
    written: str
    rows: Sequence[Record]
    starts: Sequence[Row]
    checkpoints: Sequence[Path]
    best: Path | None
    sample: str | None
    running: bool
    missing: Sequence[str]

    @property
    def name(self) -> str:
        """The name of the run, or of its folder."""
        return self.path.name if self.config is None else self.config.name

    @property
    def parameters(self) -> int | None:
        """Number of parameters of the model."""
        return None if self.config is None else count_parameters(self.config.model)

    @property
    def step(self) -> int:
        """The last step that the metrics speak of; 0 without metrics."""
        return int(max((row["step"] for row in self.rows), default=0))

    @property
    def steps(self) -> int | None:
        """Length of the run."""
        return None if self.config is None else self.config.train.steps

    @property
    def tokens(self) -> int | None:
        """Tokens seen until `step`."""
        if self.config is None:
            return int(max((row["tokens"] for row in self.rows if "tokens" in row), default=0)) or None
        return self.step * self.config.train.batch_size * self.config.train.seq_len

    @property
    def status(self) -> str:
        """One of "finished", "running", "unfinished" and, without a configuration, "unknown".

        The last step is validated, and then saved: a run that has other checkpoints but not that one will
        make its last steps again. One without any checkpoints has lost them.
        """
        if self.running:
            return RUNNING
        if self.steps is None:
            return UNKNOWN
        validated = any(step >= self.steps for step, _ in self.series("valid_loss"))
        saved = {step_of(folder) for folder in self.checkpoints}
        return FINISHED if validated and (not saved or self.steps in saved) else STOPPED

    @property
    def seconds(self) -> float | None:
        """Time spent in training steps; see `training_seconds`."""
        times = training_seconds(self.rows)
        return times[-1][1] if times else None

    def series(self, key: str) -> Points:
        """(step, value) of all rows that have `key`."""
        return [(row["step"], row[key]) for row in self.rows if row.get(key) is not None]

    def last(self, key: str) -> float | None:
        """The latest value of `key`."""
        points = self.series(key)
        return points[-1][1] if points else None

    def lowest(self, key: str) -> tuple[float, float] | None:
        """(step, value) of the first lowest value of `key`."""
        return min(self.series(key), key=lambda point: point[1], default=None)


def collect_run(path: Path) -> RunRecord:
    """Read the run directory `path`. What it lacks is named in `missing`, not an error."""
    missing: list[str] = []
    config, written = _read_config(path, missing)
    store = CheckpointStore(path / "checkpoints", 1)
    checkpoints = sorted(store.folders(), key=step_of)
    sample = path / "sample.txt"
    record = RunRecord(
        path=path,
        config=config,
        written=written,
        rows=read_metrics(path / METRICS),
        starts=read_starts(path),
        checkpoints=checkpoints,
        best=store.best(),
        sample=sample.read_text(encoding="utf-8", errors="replace") if sample.is_file() else None,
        running=in_use(path / LOCK),
        missing=(),
    )
    return replace(record, missing=[*missing, *_lacking(record)])


def _read_config(path: Path, missing: list[str]) -> tuple[RunConfig | None, str]:
    file = path / CONFIG
    if not file.is_file():
        missing.append(f"{CONFIG}: not there, so model, length of the run and calendar are not known")
        return None, ""
    written = file.read_text(encoding="utf-8", errors="replace")
    try:
        loaded = load_yaml(file)
        if not isinstance(loaded, DictConfig):
            raise ValueError("it holds no mapping")
        return run_config(plain_values(loaded)), written
    except (ValueError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split())
        missing.append(f"{CONFIG}: this version does not read it ({reason}); it is shown as it stands")
        return None, written


def _lacking(record: RunRecord) -> list[str]:
    """Sentences on what else a run directory lacks."""
    found = []
    if not record.rows:
        found.append(f"{METRICS}: no rows, so there are no curves")
    elif not record.series("valid_loss"):
        found.append("validation: none has been made yet")
    if not record.starts:
        found.append("device and versions: not recorded (starts.jsonl is not there)")
    if not record.checkpoints:
        found.append("checkpoints: none, so nothing can be resumed or evaluated")
    if record.sample is None:
        found.append("sample.txt: not there; a run writes it at its end")
    return found


def step_of(folder: Path) -> int:
    """The step in the name of a checkpoint folder, `step_00000100`."""
    return int(folder.name.partition("_")[2])


def training_seconds(rows: Sequence[Record]) -> Points:
    """(step, seconds of training until then), from the tokens and tokens per second of the metrics.

    Validations and saves are not in it, and neither are steps that a killed run had to make again.
    """
    found: Points = []
    before, total = 0.0, 0.0
    for row in rows:
        if row.get("tokens_per_second", 0) > 0 and "tokens" in row:
            total += (row["tokens"] - before) / row["tokens_per_second"]
            before = row["tokens"]
            found.append((row["step"], total))
    return found


def smooth(points: Points, window: int) -> Points:
    """The mean of each point and up to `window` - 1 points before it."""
    found = []
    for end in range(1, len(points) + 1):
        values = [value for _, value in points[max(0, end - window) : end]]
        found.append((points[end - 1][0], sum(values) / len(values)))
    return found


def smoothing_window(points: Points) -> int:
    """A twentieth of the points, and 2 at least."""
    return max(2, len(points) // 20)
