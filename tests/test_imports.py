"""Imports go down only."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import nested_learning

NAME = "nested_learning"
SOURCE = Path(nested_learning.__file__).parent
FLOORS = (
    {
        "aliases",
        "checks",
        "extras",
        "graphs",
        "html",
        "progress",
        "hub",
        "lock",
        "log_lines",
        "report",
        "runtime",
        "yaml_files",
    },
    {"state", "levels", "home"},
    {"ops", "data"},
    {"layers", "optim"},
    {"models"},
    {"adapt", "inspection"},
    {"train"},
    {"config_errors"},
    {"config", "command"},
    {"torchrun", "chat", "eval", "bench", "hf"},
    {"reproduce"},
    {"reporting"},
    {"commands"},
    {"__init__", "__main__"},
)
"""The packages and modules at the root, from the ground up. Each imports from lower floors only."""

HEIGHT = {part: height for height, floor in enumerate(FLOORS) for part in floor}
PARTS = sorted(
    path.stem for path in SOURCE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
)


def module_of(path: Path) -> str:
    """The name of a file's module without that of the package: `train.checkpoint.__init__`."""
    return ".".join(path.relative_to(SOURCE).with_suffix("").parts)


MODULES = {module_of(path): path for path in SOURCE.rglob("*.py")}


def imports(module: str) -> Iterator[tuple[int, str]]:
    """Line and module of every import of the package in a file, those in functions and for types included."""
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: line {node.lineno} imports by a relative name"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.split(".")[0] == NAME:
                yield node.lineno, resolve(name.removeprefix(NAME).lstrip("."))


def resolve(name: str) -> str:
    """The module that holds `name`, which may be a module, a package or something in one of them."""
    while name and name not in MODULES and f"{name}.__init__" not in MODULES:
        name = name.rpartition(".")[0]
    return name if name in MODULES else f"{name}.__init__".lstrip(".")


def test_every_part_has_a_floor() -> None:
    assert sorted(HEIGHT) == PARTS


@pytest.mark.parametrize("part", PARTS)
def test_imports_go_down_only(part: str) -> None:
    wrong = [
        f"{module}:{line} imports {name}"
        for module in MODULES
        if module.split(".")[0] == part
        for line, name in imports(module)
        if name.split(".")[0] != part and HEIGHT[name.split(".")[0]] >= HEIGHT[part]
    ]
    assert not wrong


@pytest.mark.parametrize("package", sorted({name.rpartition(".")[0] for name in MODULES if "." in name}))
def test_the_parts_of_a_package_import_in_one_direction(package: str) -> None:
    """No circle among the modules and packages that stand side by side in a package."""
    inside = f"{package}."
    arrows: dict[str, set[str]] = {}
    for module in (name for name in MODULES if name.startswith(inside)):
        own = module.removeprefix(inside).split(".")[0]
        others = {
            name.removeprefix(inside).split(".")[0] for _, name in imports(module) if name.startswith(inside)
        }
        arrows.setdefault(own, set()).update(others - {own})
    try:
        TopologicalSorter(arrows).prepare()
    except CycleError as error:
        pytest.fail(f"{package}: {' ← '.join(error.args[1])}")


def test_imports_are_found_wherever_they_stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "import nested_learning.checks\n"
        "from nested_learning import levels, set_seed\n"
        "from nested_learning.train import checkpoint, strategy as s\n"
        "def f():\n"
        "    from nested_learning.train.launch import launch\n"
    )
    monkeypatch.setitem(MODULES, "mine", file)
    found = ["checks", "levels", "__init__", "train.checkpoint.__init__", "train.strategy.__init__"]
    assert [name for _, name in imports("mine")] == [*found, "train.launch"]
