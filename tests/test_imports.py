"""Imports go down only, and importing the package stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import nested_learning

SOURCE = Path(nested_learning.__file__).parent
ALLOWED = {
    "checks": set(),
    "aliases": set(),
    "device": set(),
    "lock": set(),
    "yaml_files": set(),
    "extras": set(),
    "hub": set(),
    "allocator": set(),
    "state": set(),
    "levels": {"checks"},
    "ops": {"levels", "state"},
    "layers": {"levels", "state", "ops", "models.config"},
    "models": {"checks", "extras", "levels", "state", "ops", "layers"},
    "optim": {"checks", "levels", "state", "ops", "config"},
    "data": {"aliases", "checks", "extras", "hub", "lock", "levels", "state"},
}


def imports(path: Path) -> set[str]:
    """Modules of the package that a file imports, without the package's own name."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name.removeprefix("nested_learning.") for name in names if name.startswith("nested_learning.")}


@pytest.mark.parametrize("part", ALLOWED)
def test_imports_go_down_only(part: str) -> None:
    files = list((SOURCE / part).rglob("*.py")) if (SOURCE / part).is_dir() else [SOURCE / f"{part}.py"]
    assert files
    for path in files:
        for name in imports(path):
            within = {name, name.split(".")[0]}
            assert part in within or within & ALLOWED[part], f"{path.name} of {part} imports {name}"


def test_importing_the_package_is_light() -> None:
    heavy = ("datasets", "wandb", "matplotlib", "sentencepiece", "pandas", "transformers")
    code = f"import sys, nested_learning; print([m for m in {heavy} if m in sys.modules])"
    code += "; from nested_learning.state import State; print('PretrainedState' in State.kinds)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["[]", "True"]  # and a saved state of any model can be read
