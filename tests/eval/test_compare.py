"""Several results in one table."""

from __future__ import annotations

import dataclasses
import runpy
import sys
from pathlib import Path

import pytest

from nested_learning.eval.compare import CompareSettings, compare, gather, result_files, show
from nested_learning.eval.perplexity import LongTexts
from nested_learning.eval.results import EvaluationResult, Metric, proportion, write_result
from nested_learning.eval.zeroshot import ZeroShotSettings

ROOT = Path(__file__).parents[2]
DATA = Path(__file__).parent / "data" / "zeroshot"


def made(name, metrics, sha256="0" * 64, evaluation="zeroshot", **settings):
    return EvaluationResult(
        evaluation=evaluation,
        checkpoint={"name": name, "sha256": sha256},
        settings={"max_samples": 20, **settings},
        versions={},
        metrics=metrics,
        samples=20,
    )


def acc(hits, task="piqa", arm="baseline"):
    return proportion(task, "acc", hits, 20, 0.5, arm)


def cells(table):
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]


def test_a_column_per_checkpoint_and_a_row_per_number():
    a = made("a", [acc(15), acc(10, "boolq")])
    b = made("b", [acc(5)])
    loss = made("b", [Metric(task="all", name="loss", value=2.5)], evaluation="long_perplexity")
    header, _, *rows = cells(compare([a, b, loss]))
    assert header == ["evaluation", "task", "metric", "chance", "a", "b"]
    assert rows == [
        ["zeroshot", "piqa", "acc", "0.5", "0.7500 (0.5313 to 0.8881)", "0.2500 (0.1119 to 0.4687)"],
        ["zeroshot", "boolq", "acc", "0.5", "0.5000 ± 0.2007", ""],
        ["long_perplexity", "all", "loss", "", "", "2.5000"],
    ]


def test_arms_are_a_column_where_there_are_several():
    table = cells(compare([made("a", [acc(15)]), made("b", [acc(5), acc(6, arm="adapted")])]))
    assert table[0] == ["evaluation", "task", "metric", "arm", "chance", "a", "b"]
    assert table[3][3:6] == ["adapted", "0.5", ""]


def test_checkpoints_of_one_name_are_told_apart():
    table = cells(compare([made("run", [acc(15)], "a" * 64), made("run", [acc(5)], "b" * 64)]))
    assert table[0][-2:] == ["run aaaaaaaa", "run bbbbbbbb"]


def test_results_with_other_samples_are_refused():
    with pytest.raises(ValueError, match=r"zeroshot differ in max_samples \(20 and 5\)"):
        compare([made("a", [acc(15)]), made("b", [acc(5)], max_samples=5)])
    with pytest.raises(ValueError, match="differ in memorize"):
        compare([made("a", [acc(1)], memorize={"lr": 1}), made("b", [acc(5)], memorize={"lr": 2})])
    compare([made("a", [acc(1)], memorize={"lr": 1}), made("b", [acc(5)], memorize=None, batch_size=2)])
    with pytest.raises(ValueError, match="no results"):
        compare([])


def test_numbers_have_their_interval():
    assert show(Metric(task="t", name="x", value=1.0)) == "1.0000"
    assert show(Metric(task="t", name="x", value=1.0, low=0.75, high=1.25)) == "1.0000 ± 0.2500"
    assert show(Metric(task="t", name="x", value=1.0, low=0.5, high=1.25)) == "1.0000 (0.5000 to 1.2500)"


def test_files_and_folders_of_results(tmp_path):
    for name in ("b", "a"):
        write_result(tmp_path / f"{name}.json", made(name, [acc(3)]))
    assert [path.name for path in result_files([tmp_path])] == ["a.json", "b.json"]
    assert [
        r.checkpoint["name"] for r in gather([str(tmp_path / "b.json"), str(tmp_path)], CompareSettings())
    ] == [*("b", "a", "b")]
    with pytest.raises(FileNotFoundError, match="no result file at"):
        result_files([tmp_path / "c.json"])


def test_checkpoints_are_evaluated_and_stand_beside_results(run_folder, exported, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = CompareSettings(
        zeroshot=ZeroShotSettings(tasks=("boolq",), local_dir=DATA),
        perplexity=LongTexts(length=32, max_samples=2),
    )
    first = str(run_folder / "checkpoints" / "step_00000002")
    results = gather([first, str(run_folder)], settings)
    assert [r.evaluation for r in results] == ["zeroshot", "long_perplexity"] * 2
    again = gather([str(path) for path in (tmp_path / "outputs" / "eval").iterdir()], CompareSettings())
    assert sorted(map(repr, again), key=str) == sorted(
        (repr(dataclasses.replace(r, metrics=list(r.metrics))) for r in results), key=str
    )
    table = cells(compare(results))
    assert len(table[0]) == 6
    assert all(row[4] and row[5] for row in table[2:])
    with pytest.raises(ValueError, match="say what to run on it"):
        gather([str(exported)], CompareSettings())


def test_the_script_writes_table_and_picture(run_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = [str(run_folder), f"{run_folder}/checkpoints/step_00000002", "--length", "32"]
    monkeypatch.setattr(sys, "argv", ["compare.py", *arguments, "--max-samples", "2", "--output", "t.md"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "scripts" / "eval" / "compare.py"), run_name="__main__")
    assert stop.value.code == 0
    table = (tmp_path / "t.md").read_text()
    assert table in capsys.readouterr().out
    assert "perplexity per byte" in table
    assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")
