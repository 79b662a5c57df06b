"""The `nl` command."""

from __future__ import annotations

import hashlib
import importlib
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from nested_learning.commands import doctor, nl
from nested_learning.data.corpus import bundled_files


def test_bundled_text_has_the_digests_of_its_readme() -> None:
    files = bundled_files()
    assert len(files) == 4 and doctor.check_text(files) == []


def test_changed_and_missing_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("right")
    (tmp_path / "b.txt").write_text("wrong")
    digest = hashlib.sha256(b"right").hexdigest()
    lines = [f"    {digest}  {name}" for name in ("a.txt", "b.txt", "c.txt")]
    (tmp_path / "README.md").write_text("\n".join(lines))
    found = doctor.check_text(sorted(tmp_path.glob("*.txt")))
    assert found == ["c.txt is missing", "b.txt has another SHA-256"]
    assert doctor.check_text([]) == ["no bundled text"]


def test_doctor_reports_and_its_exit_code_says_whether_all_is_well(monkeypatch, capsys) -> None:
    monkeypatch.setattr(doctor, "REQUIRED", ("numpy",))
    monkeypatch.setattr(doctor, "matmul_rate", lambda: 123.0)
    assert nl.main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "123 GFLOP/s" in text and "SHA-256 right" in text and "all good" in text
    monkeypatch.setattr(doctor, "REQUIRED", ("numpy", "no_such_package"))
    assert nl.main(["doctor"]) == 1
    assert "No module named 'no_such_package'" in capsys.readouterr().out


def test_matmul_rate_counts_two_operations_per_product(monkeypatch) -> None:
    times = iter([0.0, 2.0, 10.0, 11.0])  # 2 s, then 1 s: the best counts
    monkeypatch.setattr(doctor.time, "perf_counter", lambda: next(times))
    assert doctor.matmul_rate(size=10, repeats=2) == pytest.approx(2 * 1000 / 1e9)


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
        code = nl.main(line.split())
    except SystemExit as stop:
        code = stop.code
    assert code == 2 and message in capsys.readouterr().err


MODULES = [
    module
    for entry in nl.COMMANDS.values()
    for module in (entry.commands.values() if isinstance(entry, nl.Group) else [entry])
]
ROOT = Path(__file__).parents[2]
SCRIPTS = [
    path for part in ("data", "bench", "eval") for path in sorted((ROOT / "scripts" / part).glob("*.py"))
]


@pytest.mark.parametrize("module", MODULES)
def test_every_command_has_a_main_and_a_line_of_help(module: str, monkeypatch, capsys) -> None:
    assert len(nl.first_sentence(module)) > 10
    monkeypatch.setattr(sys, "argv", ["nl", "--help"])
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(module).main()
    assert stop.value.code == 0 and "--debug" in capsys.readouterr().out


def test_help_names_every_command_and_does_not_import_torch() -> None:
    code = "import sys; from nested_learning.commands import nl"
    for line in (["--help"], ["data", "--help"]):
        code += f"\ntry: nl.main({line})\nexcept SystemExit: pass"
    code += "\nprint({'torch', 'hydra', 'numpy'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert all(name in done.stdout for name in nl.COMMANDS)
    assert "check-tokenizer" in done.stdout and done.stdout.endswith("set()\n")


def test_a_command_gets_its_own_arguments_and_the_process_gets_its_own_back(monkeypatch, capsys) -> None:
    before = sys.argv = list(sys.argv)
    assert nl.main(["--debug", "data", "validate", "nowhere.yaml"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("Traceback") and "\nnl: there is no configuration file nowhere.yaml" in error
    assert sys.argv is before
    with pytest.raises(SystemExit):
        nl.main(["data", "validate", "--help"])
    assert capsys.readouterr().out.startswith("usage: nl data validate ")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "the following arguments are required: command"),
        ("data", "the following arguments are required: command"),
        ("data proces", "invalid choice: 'proces'; did you mean process?"),
        ("--hlep", "the following arguments are required: command"),
        ("-- doctor", "invalid choice: '--'"),
    ],
)
def test_a_line_that_names_no_command(line: str, message: str, capsys) -> None:
    assert nl.main(line.split()) == 2
    out, error = capsys.readouterr()
    assert message in error and error.count("\n") == 1 and out == ""


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_script_is_a_command(script: Path) -> None:
    assert runpy.run_path(str(script))["main"].__module__ in MODULES
