"""The runner: results are kept, finished runs are skipped, failures lose nothing."""

from __future__ import annotations

import itertools
import json
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from nested_learning.commands.reproduce import parser
from nested_learning.lock import InUseError
from nested_learning.models.config import HopeConfig
from nested_learning.models.lm import HopeLM
from nested_learning.optim.config import OptimConfig
from nested_learning.reproduce import experiment
from nested_learning.reproduce.runner import Result, Tick, locked_results, read_results, run_all
from nested_learning.train import plain_loop
from nested_learning.train.plain_loop import Loop, train_steps


@dataclass(frozen=True, kw_only=True)
class Square:
    """Squares a number and leaves a mark in a folder each time it runs."""

    folder: str
    number: int
    steps: int = 2

    def run(self, tick: Tick) -> Result:
        if self.number < 0:
            raise ArithmeticError(f"number {self.number}")
        with (Path(self.folder) / f"{self.number}").open("a") as file:
            file.write("x")
        tick(self.steps)
        return {"square": self.number**2, "threads": torch.get_num_threads(), "process": os.getpid()}


def marks(folder: Path) -> dict[int, int]:
    return {int(file.name): len(file.read_text()) for file in folder.iterdir()}


@pytest.fixture
def squares(tmp_path: Path):
    folder = tmp_path / "marks"
    folder.mkdir()
    return lambda *numbers: [Square(folder=str(folder), number=n) for n in numbers]


def test_results_are_in_order_and_finished_runs_are_skipped(tmp_path, squares) -> None:
    path = tmp_path / "runs.jsonl"
    first = run_all(squares(3, 1, 3), path, workers=1, progress=False)
    assert [r["square"] for r in first] == [9, 1, 9]
    again = run_all(squares(2, 3, 1), path, workers=1, progress=False)
    assert [r["square"] for r in again] == [4, 9, 1]
    assert marks(tmp_path / "marks") == {1: 1, 2: 1, 3: 1}  # each ran exactly once
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["settings"]["number"] for row in rows] == [3, 1, 2]


def test_changed_settings_run_again(tmp_path, squares) -> None:
    path = tmp_path / "runs.jsonl"
    (run,) = squares(3)
    run_all([run], path, workers=1, progress=False)
    run_all([Square(folder=run.folder, number=3, steps=5)], path, workers=1, progress=False)
    assert marks(tmp_path / "marks") == {3: 2}


def test_a_line_cut_short_is_dropped_and_run_again(tmp_path, squares) -> None:
    path = tmp_path / "runs.jsonl"
    run_all(squares(1, 2), path, workers=1, progress=False)
    whole = path.read_text()
    path.write_text(whole[:-10])
    assert len(read_results(path)) == 1
    run_all(squares(1, 2), path, workers=1, progress=False)
    assert marks(tmp_path / "marks") == {1: 1, 2: 2}
    assert path.read_text() == whole


def test_parallel_runs_have_one_thread_and_a_failure_keeps_the_others(tmp_path, squares) -> None:
    path = tmp_path / "runs.jsonl"
    with pytest.raises(ArithmeticError, match="number -1"):
        run_all(squares(5, 6, -1), path, workers=2, progress=False)
    kept = list(read_results(path).values())
    assert sorted(r["square"] for r in kept) == [25, 36]
    assert {r["threads"] for r in kept} == {1}
    assert os.getpid() not in {r["process"] for r in kept}


def test_one_worker_restores_the_number_of_threads(tmp_path, squares) -> None:
    before = torch.get_num_threads()
    (result,) = run_all(squares(4), tmp_path / "runs.jsonl", workers=1, progress=False)
    assert result["threads"] == 1 and torch.get_num_threads() == before


def test_no_worker_is_an_error(tmp_path) -> None:
    with pytest.raises(ValueError, match="jobs must be at least 1, got 0"):
        run_all([], tmp_path / "runs.jsonl", workers=0)


def test_damaged_lines_are_dropped_and_run_again(tmp_path, squares, capsys) -> None:
    path = tmp_path / "runs.jsonl"
    run_all(squares(1, 2, 3), path, workers=1, progress=False)
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([lines[0], b"\0" * 20, b'{"task": 1}', lines[2], b""]))
    assert [r["square"] for r in run_all(squares(1, 2, 3), path, workers=1, progress=False)] == [1, 4, 9]
    assert marks(tmp_path / "marks") == {1: 1, 2: 2, 3: 1}
    assert "2 damaged lines are left out (line 2)" in capsys.readouterr().err
    assert len([json.loads(line) for line in path.read_text().splitlines()]) == 3


def test_a_second_process_on_one_file_is_kept_out(tmp_path, squares) -> None:
    path = tmp_path / "runs.jsonl"
    with locked_results(path), pytest.raises(InUseError, match=f"{path} is in use by process {os.getpid()}"):
        run_all(squares(1), path, workers=1, progress=False)
    assert not path.exists() and not marks(tmp_path / "marks")


@dataclass(frozen=True, kw_only=True)
class Short:
    """Two steps of a tiny model; the losses, and whether its mixer runs compiled."""

    steps: int = 2

    def run(self, tick: Tick) -> Result:
        torch.manual_seed(0)
        model = HopeLM(HopeConfig(vocab_size=5, dim=8, num_layers=1, num_heads=2, chunk_size=4))
        tokens = torch.randint(5, (2, 9))
        batches = itertools.repeat((tokens[:, :-1], tokens[:, 1:]))
        loop = Loop(steps=self.steps, eval_every=self.steps)
        history = train_steps(model, batches, OptimConfig(), loop, lambda m: 0.0, tick)
        return {"losses": history.losses, "compiled": model.blocks[0].mixer.compiled}


@pytest.mark.slow
def test_compiled_runs_have_the_losses_of_eager_ones(tmp_path: Path) -> None:
    (eager,) = run_all([Short()], tmp_path / "eager.jsonl", workers=1, progress=False)
    (compiled,) = run_all([Short()], tmp_path / "compiled.jsonl", workers=1, progress=False, compiled=True)
    assert (eager["compiled"], compiled["compiled"]) == (False, True)
    assert compiled["losses"] == pytest.approx(eager["losses"], abs=1e-5)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_compile_if_they_are_asked_to(tmp_path: Path, workers: int) -> None:
    (result,) = run_all([Asked()], tmp_path / "r.jsonl", workers, progress=False, compiled=True)
    assert result == {"compiled": True}
    (again,) = run_all([Asked(steps=1)], tmp_path / "r.jsonl", workers, progress=False)
    assert again == {"compiled": False}


@dataclass(frozen=True, kw_only=True)
class Asked:
    """Says whether this process compiles models."""

    steps: int = 0

    def run(self, tick: Tick) -> Result:
        return {"compiled": plain_loop._compiled}


def test_where_nothing_can_be_compiled_the_command_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiment, "missing_compiler", lambda device: "there is none")
    options = parser().parse_args(["text", "--quick", "--compile"])
    with pytest.raises(ValueError, match="--compile cannot work here: there is none"):
        options.experiment.prepare(options)


def test_experiments_without_the_plain_loop_do_not_offer_to_compile() -> None:
    with pytest.raises(ValueError, match="unknown argument '--compile'") as refused:
        parser().parse_args(["fig4", "--quick", "--compile"])
    assert "did you mean --compile" not in str(refused.value)
    assert parser().parse_args(["fig4", "--quick"]).compile is False
