"""The log of samples: evaluations that survive a kill."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any

import pytest

from nested_learning.eval.samples import score_samples, start_fresh
from nested_learning.lock import InUseError

ITEMS = [(str(i), i) for i in range(20)]


@dataclass
class OneByOne:
    """Samples whose row is what a function of the item returns."""

    items: Any
    function: Any
    replay: Any = lambda item: None
    at_once: int = 1

    def score(self, items):
        return [self.function(item) for item in items]


def evaluate_samples(log, settings, items, score, replay=lambda item: None):
    return score_samples(log, settings, OneByOne(items, score, replay))


def square(i):
    return {"square": i * i}


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


@pytest.mark.thorough
def test_kill_minus_nine_and_rerun_give_the_same_log(tmp_path):
    code = (
        "import sys, time\nfrom pathlib import Path\n"
        "from nested_learning.eval.samples import score_samples\n"
        "class Slow:\n"
        "    items, at_once = [(str(i), i) for i in range(20)], 1\n"
        "    def score(self, items):\n"
        "        time.sleep(0.02)\n"
        "        return [{'square': i * i} for i in items]\n"
        "score_samples(Path(sys.argv[1]), {}, Slow())\n"
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
