"""The package itself: importing it is light, and its public names and saved states are found all the same."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import nested_learning
from nested_learning.models.pretrained import PretrainedState


def fresh(code: str, *arguments: str) -> list[str]:
    """What a process that has imported nothing yet prints, in words."""
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


def test_importing_the_package_is_light() -> None:
    heavy = "{'datasets', 'wandb', 'matplotlib', 'sentencepiece', 'pandas', 'transformers'}"
    code = (
        f"import sys, nested_learning; print('torch' in sys.modules); nested_learning.HopeLM; print({heavy}"
    )
    assert fresh(code + " & sys.modules.keys())") == ["False", "set()"]


def test_public_names() -> None:
    for name in nested_learning.__all__:
        assert getattr(nested_learning, name).__name__ == name and name in dir(nested_learning)
    with pytest.raises(AttributeError, match="has no attribute 'HopeLm'"):
        nested_learning.HopeLm  # noqa: B018


def test_a_saved_state_of_any_model_is_read_before_its_module_is_imported(tmp_path: Path) -> None:
    PretrainedState(cache=((torch.zeros(1), torch.ones(1)),), position=7).save(tmp_path / "state.pt")
    code = "import sys; from nested_learning.state import load_state; print(load_state(sys.argv[1]).position)"
    assert fresh(code, str(tmp_path / "state.pt")) == ["7"]


def test_every_state_is_defined_by_the_modules_that_state_names() -> None:
    root = Path(nested_learning.__file__).parent
    defined = {
        n for path in root.rglob("*.py") for n in re.findall(r"(?m)^class (\w+)\(State\)", path.read_text())
    }
    code = "from importlib import import_module; from nested_learning.state import DEFINING, State"
    code += "; [import_module(name) for name in DEFINING]; print(*State.kinds)"
    assert "PretrainedState" in defined and defined <= set(fresh(code))
