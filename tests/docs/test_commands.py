"""Every command in the pages is run by tests that are named beside it, or says why it is not. And all of them
are read as they stand: options of `nl` and the scripts are parsed, configurations of `train*.py` composed."""

from __future__ import annotations

import re
import runpy
import shlex
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hydra.core.global_hydra import GlobalHydra

from nested_learning import command
from nested_learning.commands import nl
from nested_learning.config import load_config

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
STATUS = re.compile(r"<!-- (run|not run): (.+) -->")
COMMAND = re.compile(r"\w+\.(py|sh)\b|\bnl \w|^\s*(uv|pip|torchrun)\b")
PLACES = {"NAME": "pilot_smoke", "FOLDER": "folder", "[--peer-expansion 4]": "", "[my.txt]": "[README.md]"}


def blocks(text: str) -> Iterator[tuple[str | None, list[str]]]:
    """The last line of text before every block of commands, and the lines of the block."""
    lines, before, place = text.split("\n"), None, 0
    while place < len(lines):
        line = lines[place]
        if line.startswith("```"):
            end = lines.index("```", place + 1)
            if line in ("```bash", "```sh"):
                yield before, lines[place + 1 : end]
            place, before = end + 1, None
            continue
        if line.startswith("    ") and not lines[place - 1].strip():
            end = place
            while end < len(lines) and lines[end].startswith("    "):
                end += 1
            found = [one.strip() for one in lines[place:end]]
            if any(map(COMMAND.search, found)):
                yield before, found
            place, before = end, None
            continue
        before = line if line.strip() else before
        place += 1


def commands(lines: list[str]) -> Iterator[str]:
    """The commands of a block, those of a line joined by && one by one, without comments."""
    for line in re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines():
        for one in re.sub(r"(^|\s+)#.*", "", line).split(" && "):
            if one.strip():
                yield one.strip()


def all_commands() -> Iterator[Any]:
    for page in PAGES:
        if page.name == "migration.md":  # names of other projects; see test_asked.py
            continue
        for _, lines in blocks(page.read_text(encoding="utf-8")):
            for one in commands(lines):
                yield pytest.param(one, id=f"{page.name}-{one[:60]}")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_says_what_runs_it(page: Path) -> None:
    for before, lines in blocks(page.read_text(encoding="utf-8")):
        status = STATUS.fullmatch(before or "")
        assert status is not None, f"{page.name}: nothing says what runs {lines[0]!r}"
        tests = re.findall(r"(?:tests|\.ci)/[\w/.]+\w", status[2])
        assert tests or status[1] == "not run", f"{page.name}: no test runs {lines[0]!r}"
        assert [name for name in tests if not (ROOT / name).exists()] == []


class Read(Exception):
    """The command line was accepted."""


@pytest.fixture
def only_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands end once their options are parsed."""
    parse = command.Parser.parse_args

    def read(self: command.Parser, *arguments: Any) -> Any:
        parse(self, *arguments)
        raise Read

    monkeypatch.setattr(command.Parser, "parse_args", read)
    GlobalHydra.instance().clear()


def words_of(line: str) -> list[str]:
    for place, example in PLACES.items():
        line = line.replace(place, example)
    return shlex.split(line)


@pytest.mark.parametrize("line", all_commands())
def test_every_command_is_read(line: str, only_read: None, monkeypatch: pytest.MonkeyPatch) -> None:
    words = words_of(line)
    script = next((word for word in words if word.endswith(".py")), "")
    called = next((word for word in ("nl", "nested_learning") if word in words), None)
    rest = words[words.index(called or script) + 1 :] if called or script else []
    if re.fullmatch(r"train\w*\.py", script) or rest[:1] == ["train"]:
        compose(rest)
    elif called:
        with pytest.raises(Read):
            nl.dispatch("nl", nl.COMMANDS, rest)
    elif script.startswith(("scripts/bench", "scripts/data", "scripts/eval")):
        monkeypatch.setattr("sys.argv", [script, *rest])
        monkeypatch.setattr(command, "run_script", lambda main: main())
        with pytest.raises(Read):
            runpy.run_path(str(ROOT / script), run_name="__main__")
    else:
        files = [word for word in words if re.search(r"\.(sh|sbatch|py)$", word)]
        assert [word for word in files if not (ROOT / word).is_file()] == []


def compose(words: list[str]) -> None:
    """Compose the configuration that a command asks for, with the first job of a sweep. A configuration or a
    checkpoint of somebody's own, which a page can only name, is left out."""
    overrides, name = [], "pilot_smoke"
    for before, word in pairwise(["", *words]):
        if before == "--config-name" and word != "mine":
            name = word
        elif re.match(r"[+~]?[a-z][\w.]*=", word) and not word.startswith("train.init_from="):
            overrides.append(word if "[" in word else word.split(",")[0])
    assert load_config(name, overrides).train.steps >= 1


def test_what_is_wrong_is_found(only_read: None) -> None:
    for wrong in ("nl plan --gpu-count 8", "nl chat", "nl eval passkey --samples-per-length many"):
        with pytest.raises(ValueError):
            nl.dispatch("nl", nl.COMMANDS, wrong.split()[1:])
    with pytest.raises(ValueError, match=r"did you mean optim\.lr"):
        compose(["optim.lrr=1"])
    text = "Words.\n\n    uv run nl doctor\n\n<!-- run: a -->\n```bash\nnl doctor && nl audit # x\n```\n"
    found = list(blocks(text))
    assert [before for before, _ in found] == ["Words.", "<!-- run: a -->"]
    assert [list(commands(lines)) for _, lines in found] == [["uv run nl doctor"], ["nl doctor", "nl audit"]]
