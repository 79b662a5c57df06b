"""A bar for people; lines for log files."""

from __future__ import annotations

import io
import sys

import pytest

from nested_learning import progress
from nested_learning.progress import Lines, progress_bar


class Clock:
    """A time that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(progress, "time", made)
    return made


def test_a_log_file_gets_a_line_now_and_then(clock: Clock) -> None:
    """400 updates in 100 seconds: the first line, one every 30 seconds, and the last."""
    file = io.StringIO()
    bar = Lines(total=400, desc="reading", unit="step", file=file, mininterval=0)
    for number in range(400):
        clock.now += 1 / 4
        bar.update()
        bar.set_postfix_str(f"loss {number}")
    bar.close()
    lines = file.getvalue().splitlines()
    assert "\r" not in file.getvalue()
    assert [line.split("[")[0] for line in lines] == [
        "reading   0% 0/400 ",
        "reading  30% 120/400 ",
        "reading  60% 240/400 ",
        "reading  90% 360/400 ",
        "reading 100% 400/400 ",
    ]
    assert lines[-1].endswith("loss 399]")


def test_lines_that_are_printed_beside_it_stay(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    bar = progress_bar(total=3)
    assert type(bar) is Lines
    bar.update()
    bar.write("a line")
    bar.close()
    printed = capsys.readouterr()
    assert printed.out == "a line\n" and printed.err.count("\n") == 2


def test_without_a_total_and_without_work(clock: Clock) -> None:
    file = io.StringIO()
    with Lines(unit="B", unit_scale=True, file=file) as bar:
        bar.update(5_000_000)
    assert file.getvalue().splitlines()[-1].startswith("5.00M [")
    silent = io.StringIO()
    with Lines(total=3, disable=True, file=silent) as bar:
        bar.update()
    assert silent.getvalue() == ""


def test_people_get_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress_bar(total=2, file=terminal) as bar:
        bar.update()
    assert not isinstance(bar, Lines) and "\r" in terminal.getvalue()
