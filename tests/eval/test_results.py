"""Result files, intervals, and evaluations that survive a kill."""

import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest

from nested_learning.eval.results import (
    Metric,
    Result,
    average,
    evaluate_samples,
    proportion,
    read_result,
    start_fresh,
    summarise,
    versions,
    wilson,
    write_result,
)
from nested_learning.lock import InUseError

ITEMS = [(str(i), i) for i in range(20)]


def result(metrics):
    return Result(
        evaluation="toy",
        checkpoint={"name": "run"},
        settings={"n": 20},
        versions={"torch": "x"},
        metrics=metrics,
        samples=20,
    )


def square(i):
    return {"square": i * i}


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(15, 20, 0.5313, 0.8881), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (1, 1, 0.2065, 1.0)],
)
def test_wilson_interval_against_published_numbers(successes, n, low, high):
    assert wilson(successes, n) == pytest.approx((low, high), abs=1e-4)


def test_wilson_solves_its_quadratic_equation():
    p, n, z = 37 / 120, 120, 1.959963984540054
    for bound in wilson(37, 120):
        assert (p - bound) ** 2 == pytest.approx(z * z * bound * (1 - bound) / n, rel=1e-9)


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (5, 4), (-1, 4)])
def test_wilson_refuses_what_is_no_proportion(successes, n):
    with pytest.raises(ValueError, match=f"{successes} of {n}"):
        wilson(successes, n)


def test_average_is_mean_and_standard_error():
    metric = average("t", "loss", [1.0, 2.0, 4.0])
    stderr = math.sqrt(((4 / 3) ** 2 + (1 / 3) ** 2 + (5 / 3) ** 2) / 2 / 3)
    assert metric.value == pytest.approx(7 / 3)
    assert metric.stderr == pytest.approx(stderr)
    assert (metric.low, metric.high) == pytest.approx(
        (7 / 3 - 1.96 * stderr, 7 / 3 + 1.96 * stderr), rel=1e-4
    )
    assert average("t", "loss", [1.0]).low is None


def test_a_result_comes_back_and_is_summarised(tmp_path):
    written = result([proportion("piqa", "acc", 15, 20, 0.5), Metric(task="t", name="loss", value=2.5)])
    write_result(tmp_path / "a.json", written)
    assert read_result(tmp_path / "a.json") == written
    lines = summarise([tmp_path / "a.json", tmp_path / "a.json"]).splitlines()
    assert len(lines) == 6
    cells = [cell.strip() for cell in lines[2].split("|")[1:-1]]
    assert cells == ["run", "toy", "piqa", "acc", "baseline", "0.7500", "0.5313 to 0.8881", "0.5", "20"]


def test_bad_results_are_refused(tmp_path):
    with pytest.raises(ValueError, match="arm must be one of"):
        Metric(task="t", name="x", value=0, arm="best")
    with pytest.raises(ValueError, match="end in .json"):
        write_result(tmp_path / "a.txt", result([]))
    with pytest.raises(ValueError, match="JSON"):
        write_result(tmp_path / "a.json", result([Metric(task="t", name="x", value=float("nan"))]))
    assert not (tmp_path / "a.json").exists()
    (tmp_path / "b.json").write_text("{}")
    with pytest.raises(ValueError, match="no result file"):
        read_result(tmp_path / "b.json")


def test_versions_name_packages_and_commit():
    found = versions("numpy")
    assert {"python", "torch", "nested_learning", "git", "numpy"} == found.keys()
    assert found["git"] == "unknown" or len(found["git"]) == 40


def test_finished_samples_are_not_scored_again(tmp_path):
    log = tmp_path / "log.jsonl"
    seen, replayed = [], []

    def stop_at_seven(i):
        if i == 7:
            raise KeyboardInterrupt
        return square(i)

    with pytest.raises(KeyboardInterrupt):
        evaluate_samples(log, {"a": 1}, ITEMS, stop_at_seven)
    with log.open("a") as file:
        file.write('{"key": "7", "resu')  # the kill came in the middle of a line
    rows = evaluate_samples(
        log, {"a": 1}, ITEMS, lambda i: seen.append(i) or square(i), replay=replayed.append
    )
    assert seen == list(range(7, 20))
    assert replayed == list(range(7))
    assert rows == [square(i) for i in range(20)]
    whole = tmp_path / "whole.jsonl"
    evaluate_samples(whole, {"a": 1}, ITEMS, square)
    assert log.read_bytes() == whole.read_bytes()


def test_other_settings_are_refused_and_fresh_forgets(tmp_path):
    log = tmp_path / "log.jsonl"
    evaluate_samples(log, {"seed": 1}, ITEMS[:2], square)
    with pytest.raises(ValueError, match=r"seed was 1, is 2.*--fresh"):
        evaluate_samples(log, {"seed": 2}, ITEMS[:2], square)
    start_fresh(log)
    evaluate_samples(log, {"seed": 2}, ITEMS[:2], square)
    assert json.loads(log.read_text().splitlines()[0]) == {"settings": {"seed": 2}}


def test_keys_must_differ(tmp_path):
    with pytest.raises(ValueError, match="key of its own"):
        evaluate_samples(tmp_path / "log", {}, [("a", 1), ("a", 2)], square)


def test_kill_minus_nine_and_rerun_give_the_same_log(tmp_path):
    code = (
        "import sys, time\nfrom pathlib import Path\n"
        "from nested_learning.eval.results import evaluate_samples\n"
        "score = lambda i: (time.sleep(0.02), {'square': i * i})[1]\n"
        "evaluate_samples(Path(sys.argv[1]), {}, [(str(i), i) for i in range(20)], score)\n"
    )
    log, whole = tmp_path / "log.jsonl", tmp_path / "whole.jsonl"
    victim = subprocess.Popen([sys.executable, "-c", code, str(log)], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and (not log.exists() or log.read_text().count("\n") < 4):
        time.sleep(0.005)
    os.kill(victim.pid, signal.SIGKILL)
    victim.wait()
    assert 4 <= log.read_text().count("\n") < 21
    evaluate_samples(log, {}, ITEMS, square)
    evaluate_samples(whole, {}, ITEMS, square)
    assert log.read_bytes() == whole.read_bytes()


def test_a_second_process_on_one_log_is_kept_out(tmp_path):
    log = tmp_path / "x.samples.jsonl"
    tried = []

    def score(i):
        if not tried:
            for action in (lambda: evaluate_samples(log, {}, ITEMS, square), lambda: start_fresh(log)):
                with pytest.raises(InUseError, match=rf"{log} is in use by process {os.getpid()} on "):
                    action()
                tried.append(i)
        return square(i)

    rows = evaluate_samples(log, {}, ITEMS, score)
    assert len(tried) == 2 and rows == [square(i) for _, i in ITEMS]
    assert len(log.read_text().splitlines()) == 21
    assert [path.name for path in tmp_path.iterdir()] == ["x.samples.jsonl"]


def test_damaged_lines_of_a_log_are_scored_again(tmp_path, capsys):
    log = tmp_path / "x.samples.jsonl"
    expected = evaluate_samples(log, {}, ITEMS, square)
    lines = log.read_bytes().split(b"\n")
    lines[3], lines[7] = b"\0" * 30, b"\xff" + lines[7]
    log.write_bytes(b"\n".join(lines))
    scored = []
    assert evaluate_samples(log, {}, ITEMS, lambda i: scored.append(i) or square(i)) == expected
    assert scored == [2, 6]
    assert "2 damaged lines are left out (line 4)" in capsys.readouterr().err
    assert len([json.loads(line) for line in log.read_text().splitlines()]) == 21


@pytest.mark.parametrize("content", ["some notes\n", '{"text": "a"}\n', '{"settings": {}}\n{"text": "a"}\n'])
def test_a_file_that_is_no_log_is_left_alone(tmp_path, content):
    log = tmp_path / "x.samples.jsonl"
    log.write_text(content)
    with pytest.raises(ValueError, match="log of samples"):
        evaluate_samples(log, {}, ITEMS, square)
    assert log.read_text() == content
