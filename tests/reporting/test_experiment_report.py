"""The page of an experiment: its table, its runs and their curves; also before the table is made."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from invented import run_of, write_lines

from nested_learning.report import new_figure
from nested_learning.reporting import report, run_report
from nested_learning.reporting.experiment import (
    collect_experiment,
    curve_of,
    numbers_of,
    parse_table,
    settings_that_differ,
)
from nested_learning.reproduce.report import Report

RUNS = [
    {
        "task": "TextRun",
        "settings": {"model": {"levels": [mixer] * 30, "mixer": mixer, "dim": 8}, "seed": seed},
        "result": {"final": final, "solved": None, "ok": True, "curve": [[10, 5.0], [20, None], [30, final]]},
    }
    for mixer, seed, final in (("self_mod", 0, 4.125), ("self_mod", 1, 4.375), ("attention", 0, 4.5))
]


def experiment(folder: Path) -> Path:
    folder.mkdir()
    write_lines(folder / "runs.jsonl", RUNS)
    return folder


def test_a_table_is_read_back_as_it_was_written() -> None:
    rows = [["a | b", "1.5"], ["c", ""]]
    made = Report(title="Recall", header=["model", "loss"], rows=rows, numbers=[], notes=["One.", "Two."])
    assert parse_table(made.markdown()) == ("Recall", "One.\nTwo.", ["model", "loss"], rows)


def test_runs_are_told_apart_and_keep_their_numbers() -> None:
    told = settings_that_differ(RUNS)[1]
    assert told.pop("model.levels").count("self_mod") == 30
    assert told == {"model.mixer": "self_mod", "seed": "1"}
    assert numbers_of(RUNS[0]) == {"final": 4.125}
    assert curve_of(RUNS[0]) == [(10, 5.0), (30, 4.125)]


def test_the_page_of_an_experiment(tmp_path: Path) -> None:
    folder = experiment(tmp_path / "recall")
    page = run_report(folder)
    assert "results.md: not there" in page and " …</td><td>self_mod</td><td>1</td><td>4.375</td>" in page
    assert "The evaluations of 3 runs over steps. Colours by model.mixer." in page
    header, rows = ["model", "loss"], [["hope", "4.2500 ± 0.1"]]
    Report(title="Recall <1>", header=header, rows=rows, numbers=[], notes=["A note."]).write(folder)
    new_figure(2, 1).savefig(folder / "results.png")
    page = run_report(folder)
    assert "<h1>Recall &lt;1&gt;</h1>" in page and "A note." in page and "<td>4.2500 ± 0.1</td>" in page
    assert len(re.findall("data:image/png;base64,", page)) == 2 and "not there" not in page


def test_a_run_that_is_being_written_is_left_out(tmp_path: Path) -> None:
    folder = experiment(tmp_path / "recall")
    with (folder / "runs.jsonl").open("a") as file:
        file.write('{"task": "TextRun", "sett')
    record = collect_experiment(folder)
    assert len(record.runs) == 3 and "unfinished line" in record.missing[0]
    assert (folder / "runs.jsonl").read_text().endswith('"sett')  # reading changes nothing


def test_an_experiment_goes_on_a_page_of_its_own(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="recall is an experiment; give it alone"):
        report([run_of(tmp_path, "run").run_dir, experiment(tmp_path / "recall")])
