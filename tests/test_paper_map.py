"""The table of equations in docs/paper_map.md names files, functions and tests that exist."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "nested_learning"


def rows(page: str) -> list[list[str]]:
    """The cells of every row of the page's table, without its head: equation, what, code, test."""
    lines = [line.strip().strip("|").split(" | ") for line in page.splitlines() if line.startswith("|")]
    return lines[2:]


@cache
def names(file: Path) -> frozenset[str]:
    """Functions, classes, and methods as `Class.method`, that a file defines."""
    found = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{one.name}" for one in node.body if isinstance(one, ast.FunctionDef)}
    return frozenset(found)


def lacking_code(cell: str) -> Iterator[str]:
    """`file.py` or `file.py: name, Class.method`, below the package, of which something does not exist."""
    for path, _, listed in (code.partition(": ") for code in re.findall(r"`([\w/]+\.py[^`]*)`", cell)):
        if not (SOURCE / path).is_file():
            yield path
        else:
            wanted = [name for name in listed.split(", ") if name]
            yield from (f"{path}: {name}" for name in wanted if name not in names(SOURCE / path))


def lacking_tests(cells: list[str]) -> Iterator[str]:
    """`tests/file.py`, `tests/file.py::test` or `::test`, the latter of the file before it, as above."""
    file = ""
    for code in (code for cell in cells for code in re.findall(r"`([^`]+)`", cell)):
        path, _, test = code.partition("::")
        if path.startswith("tests/"):
            file = path
        if not (file and exists_in(ROOT / file, path if path != file else "", test)):
            yield code


def exists_in(file: Path, variant: str, test: str) -> bool:
    """Whether a file exists, with this test and this variant of tests ("" = none)."""
    if not file.is_file() or (test and test not in names(file)):
        return False
    return variant in file.read_text(encoding="utf-8")


PAGE = rows((ROOT / "docs" / "paper_map.md").read_text(encoding="utf-8"))


@pytest.mark.parametrize("row", PAGE, ids=lambda row: f"{row[0].strip()}-{row[1][:30]}")
def test_code_of_an_equation_exists(row: list[str]) -> None:
    assert len(row) == 4
    assert "`" in row[2]
    assert list(lacking_code(row[1] + row[2])) == []


def test_tests_of_the_equations_exist() -> None:
    assert len(PAGE) > 20
    assert all("`" in row[3] or row[3].strip() == "the same" for row in PAGE)
    assert list(lacking_tests([row[3] for row in PAGE])) == []


def test_the_checks_find_what_is_wrong() -> None:
    assert list(lacking_code("`ops/gone.py` `levels.py: calendar, gone` `layers/cms.py: CMS.gone`")) == [
        "ops/gone.py",
        "levels.py: gone",
        "layers/cms.py: CMS.gone",
    ]
    found = lacking_tests(
        ["`tests/test_levels.py::test_gone`, `tests/gone.py`, `::test_gone`, `gone_variant`"]
    )
    assert list(found) == ["tests/test_levels.py::test_gone", "tests/gone.py", "::test_gone", "gone_variant"]
    assert (
        list(lacking_tests(["`tests/layers/test_cms.py::test_counters_are_the_calendar`", "`nested`"])) == []
    )
