import importlib.util
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("pins", ROOT / "scripts" / "pins.py")
pins = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(pins)

PROJECT = """[project]
name = "mine"
[tool.uv]
# how
constraint-dependencies = [
    "a==1.0",
    "old==3",
]
[tool.other]
list = [
    "a==1.0",
]
"""
NEW = ["a==2.0 ; python_full_version < '3.12'", "a==2.1 ; python_full_version >= '3.12'", "b==1"]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "pyproject.toml").write_text(PROJECT)
    (tmp_path / "requirements.txt").write_text("# versions\na==1.0\nown==7\n-e .\n")
    return tmp_path


def fake_uv(folder, calls, fails=False):
    """uv, as far as it is called: the command and the pins it was called with, and `NEW`."""

    def uv(command, *arguments, folder):
        text = (folder / "pyproject.toml").read_text()
        calls.append((command, tomllib.loads(text)["tool"]["uv"]["constraint-dependencies"]))
        if fails:
            raise subprocess.CalledProcessError(1, "uv")
        if command == "export" and "--no-hashes" not in arguments:
            calls.pop()
            return "a==2.0 --hash=sha256:0\n"
        return "".join(f"{pin}\n" for pin in NEW)

    return uv


@pytest.mark.parametrize("upgrade", [False, True])
def test_both_files_get_the_versions_of_uv_and_nothing_else_changes(folder, monkeypatch, upgrade):
    calls = []
    monkeypatch.setattr(pins, "uv", fake_uv(folder, calls))
    pins.make_pins(folder, upgrade)
    text = (folder / "pyproject.toml").read_text()
    before, after = tomllib.loads(PROJECT), tomllib.loads(text)
    assert after["tool"]["uv"].pop("constraint-dependencies") == NEW
    before["tool"]["uv"].pop("constraint-dependencies")
    assert after == before and "# how" in text
    assert (folder / "requirements.txt").read_text().splitlines() == [
        "# versions",
        *NEW[:2],
        "own==7",
        "-e .",
    ]
    assert (folder / pins.LOCKED).read_text() == pins.LOCKED_HEAD + "a==2.0 --hash=sha256:0\n"
    kept = ["a==1.0", "old==3"]
    assert calls == ([("lock", []), ("export", [])] if upgrade else [("export", kept)])


def test_nothing_changes_where_uv_finds_no_versions(folder, monkeypatch):
    monkeypatch.setattr(pins, "uv", fake_uv(folder, [], fails=True))
    with pytest.raises(subprocess.CalledProcessError):
        pins.make_pins(folder, upgrade=True)
    assert (folder / "pyproject.toml").read_text() == PROJECT


def test_a_second_time_changes_nothing():
    once = pins.with_pins(PROJECT, NEW)
    assert pins.with_pins(once, NEW) == once
    versions = pins.with_versions("a==1.0\nb==0\n", NEW)
    assert pins.with_versions(versions, NEW) == versions == "".join(f"{pin}\n" for pin in NEW)


def test_a_project_without_the_list_is_refused():
    with pytest.raises(ValueError, match="found 0"):
        pins.with_pins("[project]\n", NEW)


def test_the_pins_of_this_repository_cover_what_it_depends_on():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    listed = project["tool"]["uv"]["constraint-dependencies"]
    groups = [project["project"]["dependencies"], *project["project"]["optional-dependencies"].values()]
    groups += project["dependency-groups"].values()
    pinned = {pins.name_of(pin) for pin in listed}
    assert {requirement.split(">=")[0] for group in groups for requirement in group} <= pinned
    requirements = (ROOT / "requirements.txt").read_text()
    assert pins.with_versions(requirements, listed) == requirements


def test_the_locked_versions_are_the_pinned_ones_and_name_no_place():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    text = (ROOT / pins.LOCKED).read_text()
    lines = [line.removesuffix(" \\") for line in text.splitlines() if line[0] not in " #"]
    assert {line.split(" ;")[0] for line in lines} <= {
        pin.split(" ;")[0] for pin in project["tool"]["uv"]["constraint-dependencies"]
    }
    needed = {requirement.split(">=")[0] for requirement in project["project"]["dependencies"]}
    assert needed <= {pins.name_of(line) for line in lines}
    hashes = re.findall(r"--hash=sha256:[0-9a-f]{64}", text)
    assert len(hashes) > len(lines) > 50 and "://" not in text
