"""The `nl` command."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from nested_learning import cli
from nested_learning.data.corpus import bundled_files


def test_bundled_text_has_the_digests_of_its_readme() -> None:
    files = bundled_files()
    assert len(files) == 4 and cli.check_text(files) == []


def test_changed_and_missing_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("right")
    (tmp_path / "b.txt").write_text("wrong")
    digest = hashlib.sha256(b"right").hexdigest()
    lines = [f"    {digest}  {name}" for name in ("a.txt", "b.txt", "c.txt")]
    (tmp_path / "README.md").write_text("\n".join(lines))
    found = cli.check_text(sorted(tmp_path.glob("*.txt")))
    assert found == ["c.txt is missing", "b.txt has another SHA-256"]
    assert cli.check_text([]) == ["no bundled text"]


def test_doctor_reports_and_its_exit_code_says_whether_all_is_well(monkeypatch, capsys) -> None:
    monkeypatch.setattr(cli, "REQUIRED", ("numpy",))
    monkeypatch.setattr(cli, "matmul_rate", lambda: 123.0)
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "123 GFLOP/s" in text and "SHA-256 right" in text and "all good" in text
    monkeypatch.setattr(cli, "REQUIRED", ("numpy", "no_such_package"))
    assert cli.main(["doctor"]) == 1
    assert "No module named 'no_such_package'" in capsys.readouterr().out


def test_matmul_rate_counts_two_operations_per_product(monkeypatch) -> None:
    times = iter([0.0, 2.0, 10.0, 11.0])  # 2 s, then 1 s: the best counts
    monkeypatch.setattr(cli.time, "perf_counter", lambda: next(times))
    assert cli.matmul_rate(size=10, repeats=2) == pytest.approx(2 * 1000 / 1e9)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("reproduce recall --steps 0", "must be at least 1, got 0"),
        ("reproduce recall --reads late", "invalid choice: 'late'"),
        ("reproduce chunk-size --lengths 300", "lengths must divide tokens = 2048, got 300"),
        ("reproduce defaults --settings memory.alfa=1", "unknown key 'model.memory.alfa'"),
        ("reproduce nothing", "invalid choice: 'nothing'"),
    ],
)
def test_input_that_is_not_allowed(line: str, message: str, capsys) -> None:
    try:
        code = cli.main(line.split())
    except SystemExit as stop:
        code = stop.code
    assert code == 2 and message in capsys.readouterr().err
