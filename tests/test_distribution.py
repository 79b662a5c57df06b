"""The name of the distribution, and what people are told to install."""

from __future__ import annotations

import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from nested_learning.eval import questions
from nested_learning.extras import DISTRIBUTION, EXTRAS, MissingExtraError, own_version
from nested_learning.models import pretrained
from nested_learning.reproduce import digits

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "pyproject.toml", "docs/**/*.md", "src/**/*.py", "scripts/**/*", "notebooks/*.ipynb"]
INSTALLS = r"(pip|uv|poetry|conda)\s+(pip\s+)?(install|add)\b[^\n#]*|^dependencies.*|metadata\.version\([^)]*"
SOMEBODY_ELSES = r"nested-learning(?!-torch)(?!/)(?![\w-])"


def tells_to_install_it(text: str) -> bool:
    """Whether a command that installs names what is not ours, or any text one of its extras."""
    commands = (found.group() for found in re.finditer(INSTALLS, text, re.MULTILINE))
    own = re.search(SOMEBODY_ELSES + r"\[", text)
    return own is not None or any(re.search(SOMEBODY_ELSES, command) for command in commands)


@pytest.mark.parametrize(
    "text, wrong",
    [
        ('pip install "nested-learning[bench]"', True),
        ("uv pip install -U nested-learning", True),
        ("uv add nested-learning==0.2.0", True),
        ("get `nested-learning[hf]` first", True),
        ('metadata.version("nested-learning")', True),
        ("pip install nested-learning-torch", False),
        ("pip install dist/nested_learning_torch-0.1.0-py3-none-any.whl", False),
        ("cd nested-learning && pip install -e '.[hf]'", False),
    ],
)
def test_the_search_finds_what_it_should(text: str, wrong: bool) -> None:
    assert tells_to_install_it(text) is wrong


def test_no_page_tells_anyone_to_install_a_package_that_is_not_ours() -> None:
    files = [path for pattern in PAGES for path in ROOT.glob(pattern) if path.is_file()]
    assert len(files) > 100
    assert [str(path) for path in files if tells_to_install_it(path.read_text(errors="ignore"))] == []


def test_one_name_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["name"] == DISTRIBUTION != "nested-learning"
    assert own_version() == project["version"] == metadata.version(DISTRIBUTION)
    assert set(EXTRAS.values()) <= set(project["optional-dependencies"])


def test_a_missing_extra_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    uses = {
        "transformers": pretrained._transformers,
        "lm_eval": lambda: next(questions._hub_records("piqa")),
        "sklearn": digits.digits.__wrapped__,
    }
    monkeypatch.setattr(questions, "check_hub", lambda instead: None)
    for package, use in uses.items():
        for module in (package, f"{package}.tasks", f"{package}.datasets"):
            monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(
            MissingExtraError, match=f"{package} is not .* uv sync --extra {EXTRAS[package]}, "
        ):
            use()
