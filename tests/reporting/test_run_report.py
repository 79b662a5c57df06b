"""The page of a run says what its directory holds, and what it lacks."""

from __future__ import annotations

import hashlib
import re
from dataclasses import asdict
from html import unescape
from pathlib import Path

import pytest
from invented import rows, run_of, write_lines

from nested_learning.commands import nl
from nested_learning.eval.results import EvaluationResult, proportion, write_result
from nested_learning.lock import locked
from nested_learning.models.bill import count_parameters
from nested_learning.reporting import report, run_report
from nested_learning.reporting.configuration import changed, differing
from nested_learning.reporting.evaluations import find_evaluations
from nested_learning.reporting.parts import count, duration
from nested_learning.reporting.run import collect_run, smooth, training_seconds
from nested_learning.reporting.samples import spread
from nested_learning.train.config import RunConfig


def words(page: str) -> str:
    """The text of a page without tags and pictures."""
    return unescape(re.sub(r"<[^>]*>", " ", page))


def tile(page: str, what: str) -> list[str]:
    """Value and remark of a tile."""
    found = re.search(rf"<dt>{re.escape(what)}</dt><dd>(.*?)</dd>", page)
    assert found is not None, f"no tile {what}"
    return [unescape(part) for part in re.split(r"</?small>", found[1]) if part]


def test_the_numbers_of_a_run_that_broke_off(tmp_path: Path) -> None:
    config = run_of(tmp_path, "mine")
    page = run_report(config.run_dir)
    assert tile(page, "status") == ["unfinished", "step 30 of 40"]
    assert tile(page, "validation loss, last")[0] == "4.4567"
    assert tile(page, "validation loss, best") == ["4.3217", "at step 20"]
    assert tile(page, "bits per byte, best") == ["2.6789", "last 2.7654"]
    assert tile(page, "tokens seen")[0] == "600"
    assert tile(page, "training time")[0] == "35 s"  # 200/10 + 200/20 + 200/40
    assert tile(page, "parameters")[0] == count(count_parameters(config.model))
    assert "quick (chunk_size=4), mlp" in tile(page, "parameters")[1]
    assert "<td>quick</td><td>0.1534</td><td>0.04321</td>" in page
    assert page.count("data:image/png;base64,") == 4  # losses, panels, levels, calendar
    assert not re.search(r"(src|href)=\"(?!data:)", page)
    text = words(page)
    for missing in ("device and versions: not recorded", "checkpoints: none", "sample.txt: not there"):
        assert missing in text
    assert "no process is at work on it" in text and "<td>train.steps</td><td>40</td><td>200</td>" in page


def test_a_run_under_way_says_so(tmp_path: Path) -> None:
    config = run_of(tmp_path, "mine", validated=False)
    with locked(config.run_dir / ".lock", "run"):
        page = run_report(config.run_dir)
        assert tile(page, "status")[0] == "running" and "under way" in page
    assert tile(page, "validation loss, last")[0] == "none yet"
    assert "validation: none has been made yet" in page
    assert tile(run_report(config.run_dir), "status")[0] == "unfinished"


def test_a_run_is_finished_when_its_last_step_is_validated_and_saved(tmp_path: Path) -> None:
    config = run_of(tmp_path, "mine", steps=30)
    assert collect_run(config.run_dir).status == "finished"  # without any checkpoint: deleted by someone
    (config.run_dir / "checkpoints" / "step_00000020").mkdir(parents=True)
    assert collect_run(config.run_dir).status == "unfinished"
    (config.run_dir / "checkpoints" / "step_00000030").mkdir()
    assert collect_run(config.run_dir).status == "finished"
    write_lines(config.run_dir / "metrics.jsonl", rows(validated=False))
    assert collect_run(config.run_dir).status == "unfinished"


def test_a_run_without_a_usable_configuration(tmp_path: Path) -> None:
    config = run_of(tmp_path, "mine")
    file = config.run_dir / "config.yaml"
    file.write_text(file.read_text().replace("seq_len:", "seq_length:"))
    page = run_report(config.run_dir)
    assert "this version does not read it" in page and "seq_length: 10" in page
    assert tile(page, "parameters") == ["unknown"] and tile(page, "tokens seen")[0] == "600"
    file.unlink()
    assert tile(run_report(config.run_dir), "status")[0] == "unknown"


def test_a_run_that_has_not_logged_yet(tmp_path: Path) -> None:
    config = run_of(tmp_path, "mine")
    (config.run_dir / "metrics.jsonl").write_text('{"step": 1, "lo')
    page = run_report(config.run_dir)
    assert "metrics.jsonl: no rows" in page and tile(page, "training time")[0] == "unknown"


def test_times_and_means() -> None:
    assert training_seconds(rows(validated=True)) == [(10, 20.0), (20, 30.0), (30, 35.0)]
    assert smooth([(1, 4.0), (2, 2.0), (3, 0.0), (4, 8.0)], 2) == [(1, 4.0), (2, 3.0), (3, 1.0), (4, 4.0)]
    assert [duration(s) for s in (None, 59.6, 3599, 18120)] == [
        "unknown",
        "1 min 00 s",
        "59 min 59 s",
        "5 h 02 min",
    ]
    assert [count(n) for n in (950, 61_440, 1_130_000, 168_400_000)] == ["950", "61.4 k", "1.13 M", "168 M"]
    folders = [Path(f"step_{n:08d}") for n in range(11)]
    assert [folder.name[-2:] for folder in spread(folders, 3)] == ["00", "05", "10"]


def result_of(checkpoint: dict[str, str]) -> EvaluationResult:
    metrics = [proportion("piqa", "acc", 12, 20, chance=0.5)]
    return EvaluationResult(
        evaluation="zeroshot", checkpoint=checkpoint, settings={}, versions={}, metrics=metrics, samples=20
    )


def test_evaluations_are_those_of_the_run(tmp_path: Path) -> None:
    config = run_of(tmp_path, "mine")
    folder = config.run_dir / "checkpoints" / "step_00000020"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")
    digest = hashlib.sha256(b"{}").hexdigest()
    results = tmp_path / "results"
    write_result(results / "own.json", result_of({"name": "x", "path": "copied", "sha256": digest}))
    gone = str(config.run_dir / "checkpoints" / "step_00000010")
    write_result(results / "gone.json", result_of({"name": "x", "path": gone, "sha256": "0" * 64}))
    write_result(results / "other.json", result_of({"name": "mine", "path": "mine", "sha256": "1" * 64}))
    (results / "settings.json").write_text("[]")
    found = find_evaluations(collect_run(config.run_dir), [results])
    assert [(one.path.name, one.checkpoint) for one in found] == [
        ("gone.json", "step_00000010 (no longer kept as it was)"),
        ("own.json", "step_00000020"),
    ]
    (results / "own.json").rename(config.run_dir / "own.json")
    cells = "<td>piqa</td><td>acc</td><td>baseline</td><td>0.6000</td><td>0.3866 to 0.7812</td><td>0.5</td>"
    assert cells in run_report(config.run_dir, samples=False)  # Wilson's interval of 12 of 20


def test_differences_between_configurations(tmp_path: Path) -> None:
    one, other = run_of(tmp_path, "one"), run_of(tmp_path, "other", batch_size=4)
    assert differing([one, None, other]) == [("train.batch_size", ["2", "?", "4"])]
    names = {name: (value, default) for name, value, default in changed(one)}
    assert names["train.batch_size"] == ("2", "8") and "optim.lr" not in names
    assert changed(RunConfig(**{k: getattr(RunConfig(), k) for k in asdict(RunConfig())})) == []


def test_runs_over_each_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [run_of(tmp_path, "one").run_dir, run_of(tmp_path, "sweep/two", steps=30).run_dir]
    assert nl.main(["report", *map(str, paths)]) == 0
    page = (tmp_path / "report.html").read_text()
    assert "<tr><td>one</td><td>unfinished</td><td>30 of 40</td>" in page
    assert "<tr><td>sweep/two</td><td>finished</td><td>30 of 30</td>" in page
    assert "<td>train.steps</td><td>40</td><td>30</td>" in page
    assert "2 runs, 1 of them not finished" in page and "one: checkpoints: none" in page


def test_wrong_folders_are_told_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_of(tmp_path, "longer").run_dir
    cases = {
        (tmp_path / "longr",): "does not exist; did you mean longer?",
        (tmp_path / "xyz",): f"in {tmp_path} there are longer",
        (tmp_path,): f"is no run; there are {run}",
        (run / "config.yaml",): "is a file",
        (run, run): "is given twice",
    }
    for given, expected in cases.items():
        with pytest.raises(ValueError, match=re.escape(expected)):
            report(given)
    assert nl.main(["report", str(run), "--output", "page.pdf"]) == 2
    assert nl.main(["report", str(tmp_path / "longr")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and "--output must end in .html, got page.pdf" in lines[0]


def test_a_broken_off_run_is_resumed_by_what_started_it(tmp_path: Path) -> None:
    config = run_of(tmp_path, "my run")
    assert "There is no checkpoint yet" in run_report(config.run_dir, samples=False)
    (config.run_dir / "checkpoints" / "step_00000020").mkdir(parents=True)
    options = f"--config-dir '{config.run_dir}' --config-name config"
    assert f"uv run python train.py {options}" in unescape(run_report(config.run_dir, samples=False))
    write_lines(config.run_dir / "starts.jsonl", [{"step": 0, "strategy": "ddp", "devices": 2}])
    page = unescape(run_report(config.run_dir, samples=False))
    assert f"uv run torchrun --nproc-per-node 2 train_dist.py {options}" in page
