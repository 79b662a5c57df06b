"""Sweeps: a folder for every job, and a table of all."""

import csv
import json

import pytest
from omegaconf import OmegaConf
from test_train_command import SETTINGS, train  # noqa: F401  (a fixture)

from nested_learning.commands import sweep
from nested_learning.commands.sweep import Job, differences, markdown, write_table


def job(folder, name, overrides, rows=(), **more):
    run_dir = folder / name
    run_dir.mkdir()
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Job(overrides=overrides, run_dir=run_dir, seconds=1.25, **more)


@pytest.fixture
def jobs(tmp_path):
    valid = {"valid_loss": 2.5, "valid_bits_per_byte": 1.25}
    first = [{"step": 2, **valid, "valid_loss": 3.0}, {"step": 4, "loss": 1.0}, {"step": 4, **valid}]
    return [
        job(tmp_path, "a", {"seed": "0", "train.steps": "4"}, first),
        job(tmp_path, "b", {"seed": "1", "train.steps": "4"}, [{"step": 3, "loss": 1.0}], failed=True),
    ]


def test_the_table_has_what_differs_and_the_last_results(jobs, tmp_path):
    assert markdown(jobs).splitlines() == [
        "| seed | validation loss | bits/byte | steps | seconds | status |",
        "| ---- | --------------: | --------: | ----: | ------: | -----: |",
        "| 0    |          2.5000 |    1.2500 |     4 |     1.2 |   done |",
        "| 1    |                 |           |     3 |     1.2 | failed |",
    ]
    write_table(jobs, tmp_path / "sweep")
    assert (tmp_path / "sweep" / "sweep.md").read_text() == markdown(jobs)
    with (tmp_path / "sweep" / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["seed"] for row in rows] == ["0", "1"]
    assert rows[0]["validation loss"] == "2.5000" and rows[1]["validation loss"] == ""
    assert rows[1]["run"] == str(tmp_path / "b")
    assert (tmp_path / "sweep" / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_what_differs(tmp_path, jobs):
    assert differences(jobs) == (["seed"], [["0"], ["1"]])
    assert differences(jobs[:1]) == (["seed", "train.steps"], [["0", "4"]])
    other = job(tmp_path, "c", {"optim.lr": "0.1", "seed": "0"})
    assert differences([jobs[0], other]) == (["train.steps", "optim.lr"], [["4", ""], ["", "0.1"]])


def test_a_table_without_results_and_with_odd_values(tmp_path):
    lone = job(tmp_path, "d", {"data.files": "[a|b]"})
    assert "| [a\\|b]     |                 |" in markdown([lone])
    write_table([lone], tmp_path)
    assert not (tmp_path / "sweep.png").exists()


def test_three_seeds(train, tmp_path, capsys):  # noqa: F811
    assert train("-m", "seed=0,1,2") == 0
    printed = capsys.readouterr().out
    folder = tmp_path / "pilot_smoke"
    assert {p.name for p in folder.iterdir()} == {
        *("seed=0", "seed=1", "seed=2", "multirun.yaml"),
        *("sweep.md", "sweep.csv", "sweep.png"),
    }
    table = (folder / "sweep.md").read_text()
    assert f"{table}\nthe table is in {folder}/sweep.md" in printed
    assert table.count("|   done |") == 3
    with (folder / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    for seed, row in enumerate(rows):
        run_dir = folder / f"seed={seed}"
        assert (row["seed"], row["steps"], row["run"]) == (str(seed), "2", str(run_dir))
        metrics = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        assert float(row["validation loss"]) == pytest.approx(metrics[-1]["valid_loss"], abs=5e-5)
        assert OmegaConf.load(run_dir / "config.yaml").seed == seed
    assert len({row["validation loss"] for row in rows}) == 3


def test_a_job_that_fails_is_in_the_table_and_decides_the_status(train, tmp_path, capsys):  # noqa: F811
    assert train("-m", "train.accumulation=3,1") not in (None, 0)
    printed = capsys.readouterr().out
    assert [line.split()[1] for line in printed.splitlines() if line.endswith("| failed |")] == ["3"]
    assert [line.split()[1] for line in printed.splitlines() if line.endswith("|   done |")] == ["1"]


def test_a_sweep_over_names_has_its_table_above_them(train, tmp_path, capsys):  # noqa: F811
    assert train("-m", "name=a,b") == 0
    assert (tmp_path / "sweep.md").read_text().startswith("| name |")


def test_other_ranks_write_and_print_nothing(train, tmp_path, capsys, monkeypatch):  # noqa: F811
    monkeypatch.setattr(sweep, "_is_main", lambda: False)
    assert train("-m", "seed=0,1") == 0
    assert not list(tmp_path.rglob("sweep.*"))
    assert "| seed" not in capsys.readouterr().out


def test_a_single_run_has_no_table(train, tmp_path, capsys):  # noqa: F811
    assert train() == 0
    assert not list(tmp_path.rglob("sweep.*"))
