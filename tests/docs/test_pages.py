"""The pages agree with the repository: links lead somewhere, and files, tests, options and fields exist."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from nested_learning.config import RunConfig

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    path
    for pattern in ("README.md", "CONTRIBUTING.md", "docs/**/*.md", "src/**/*.md")
    for path in ROOT.glob(pattern)
)
HOMES = (ROOT, ROOT / "src" / "nested_learning", ROOT / "docs", ROOT / "src")
MADE = ("outputs/", "results/", "dist/", "runs/", "logs/")  # written by commands, not kept in the repository
FENCED = re.compile(r"^```\w*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NOT_OURS = {"--config-name", "--config-dir", "--nproc-per-node", "--extra"}  # Hydra's, torchrun's, uv's


# What stands in a page


def prose(text: str) -> str:
    """A page without its fenced blocks."""
    return FENCED.sub("", text)


def commands(text: str) -> list[str]:
    """Lines of the fenced and indented blocks that call a script or `nl`, without comments."""
    indented = re.findall(r"^ {4}\S.*$", prose(text), flags=re.MULTILINE)
    joined = re.sub(r"\\\n\s*", "", "\n".join([*FENCED.findall(text), *indented]))
    lines = [re.sub(r"\s+#.*", "", line).strip() for line in joined.splitlines()]
    return [line for line in lines if re.search(r"\w+\.(py|sh)\b|\bnl \w", line)]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


# What is in the repository


@cache
def file_names() -> set[str]:
    folders = ("src", "scripts", "tests", "configs", "examples", "docs", "notebooks")
    files = [*ROOT.glob("*"), *(file for folder in folders for file in (ROOT / folder).rglob("*"))]
    return {file.name for file in files}


def exists(path: str) -> bool:
    """Whether a file or folder is in the repository; {a,b} stands for both, a bare name for any folder."""
    if options := re.search(r"\{([^{}]*)\}", path):
        return all(exists(path.replace(options.group(), one, 1)) for one in options.group(1).split(","))
    return any((home / path).exists() for home in HOMES) or path in file_names()


@cache
def sources(*folders: str) -> str:
    files = sorted(file for folder in folders for file in (ROOT / folder).rglob("*.py"))
    return "\n".join(file.read_text(encoding="utf-8") for file in files)


@cache
def keys(of: type, prefix: str = "") -> frozenset[str]:
    """The dotted names of a configuration's fields, those of its sections included."""
    found = set()
    hints = get_type_hints(of)
    for field in fields(of):
        found.add(prefix + field.name)
        for kind in (hints[field.name], *get_args(hints[field.name])):
            if is_dataclass(kind):
                found |= keys(kind, f"{prefix}{field.name}.")
    return frozenset(found)


# What is wrong with a page


def dead_links(text: str, page: Path) -> Iterator[str]:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(text)):
        path, _, anchor = target.partition("#")
        file = (page.parent / path) if path else page
        if target.startswith(("http://", "https://")):
            continue
        if not file.exists() or (anchor and anchor not in anchors(file)):
            yield target


def lacking_files(text: str, page: Path) -> Iterator[str]:
    codes = re.findall(r"`([^`\n]+)`", prose(text))
    words = [word for code in codes if " " in code for word in code.split() if word.startswith("tests/")]
    for code in [*codes, *words]:
        path = re.split(r"::|: |[:,] ", code)[0]
        is_file = re.fullmatch(r"[\w.{},/-]*/[\w.{},/-]+\.(md|yaml)|[\w.{},/-]+\.(py|sh)", path)
        if is_file and not path.startswith(MADE) and "NAME" not in path and not exists(path):
            yield path


def lacking_names(text: str, page: Path) -> Iterator[str]:
    """`file.py: name` of a name that does not occur in the file."""
    for path, names in re.findall(r"`([\w/]+\.py): ([\w., ]+)`", prose(text)):
        source = next((home / path for home in HOMES if (home / path).is_file()), None)
        for one in re.split(r"[., ]+", names):
            if source is None or not re.search(rf"\b{one}\b", source.read_text(encoding="utf-8")):
                yield f"{path}: {one}"


def lacking_tests(text: str, page: Path) -> Iterator[str]:
    for test in re.findall(r"::(test_\w+)", text):
        if not re.search(rf"^ *def {test}\(", sources("tests"), flags=re.MULTILINE):
            yield test


def lacking_scripts(text: str, page: Path) -> Iterator[str]:
    for line in commands(text):
        for script in re.findall(r"(?:^|\s)((?:[\w-]+/)*[\w-]+\.(?:py|sh))\b", line):
            if not exists(script):
                yield script


def lacking_options(text: str, page: Path) -> Iterator[str]:
    for line in commands(text):
        if not re.search(r"scripts/\S+\.py |\bnl ", line):
            continue
        for option in set(re.findall(r"(?<=[\s\[])--[a-z][\w-]*", line)) - NOT_OURS:
            field = option[2:].replace("-", "_")  # options that are made of a dataclass
            code = sources("src", "scripts")
            if f'"{option}"' not in code and not re.search(rf"^    {field}: ", code, re.MULTILINE):
                yield option


def lacking_fields(text: str, page: Path) -> Iterator[str]:
    """Overrides, in commands of train*.py, of fields or choices that do not exist."""
    for line in commands(text):
        if not re.search(r"\btrain(_\w+)?\.py\b", line):
            continue
        for field, value in re.findall(r"(?:^|[\s'\"])[+~]*([a-z_][\w.]*)=([^\s'\"]*)", line):
            choice = (ROOT / "configs" / field / f"{value}.yaml").is_file()
            if field not in keys(RunConfig) and not (ROOT / "configs" / field).is_dir():
                yield field
            elif (ROOT / "configs" / field).is_dir() and not choice and not value.startswith("["):
                yield f"{field}={value}"


CHECKS = [dead_links, lacking_files, lacking_names, lacking_tests]
CHECKS += [lacking_scripts, lacking_options, lacking_fields]
Check = Callable[[str, Path], Iterator[str]]


@pytest.mark.parametrize(
    "page, check",
    [
        pytest.param(page, check, id=f"{page.relative_to(ROOT).as_posix()}-{check.__name__}")
        for page in PAGES
        for check in CHECKS
        if page.name != "migration.md" or check is dead_links  # it lists what others have; see test_asked.py
    ],
)
def test_a_page_agrees_with_the_repository(page: Path, check: Check) -> None:
    assert list(check(page.read_text(encoding="utf-8"), page)) == []


@pytest.mark.parametrize(
    "text, found",
    [
        (
            "[a](levels.md#variants) [b](nowhere.md) [c](levels.md#nothing)",
            ["nowhere.md", "levels.md#nothing"],
        ),
        ("`levels.py` and `ops/nothing.py` and `gone.py`", ["ops/nothing.py", "gone.py"]),
        ("`levels.py: calendar, nothing_of_this`", ["levels.py: nothing_of_this"]),
        ("`uv run pytest tests/test_levels.py tests/gone.py`", ["tests/gone.py"]),
        ("`x.py::test_nothing_like_it`", ["x.py", "test_nothing_like_it"]),
        ("    uv run python scripts/bench/gone.py --smoke", ["scripts/bench/gone.py"]),
        ("```bash\nuv run nl audit --all \\\n  --no-such-option  # --ignored\n```\n", ["--no-such-option"]),
        (
            "    uv run python train.py optim.lrr=1 optim=m3 optim=m9 optim.m3.eps=1",
            ["optim.lrr", "optim=m9"],
        ),
    ],
)
def test_the_checks_find_what_is_wrong(text: str, found: list[str]) -> None:
    page = ROOT / "docs" / "levels.md"
    assert [wrong for check in CHECKS for wrong in check(text, page)] == found


def test_the_tree_of_the_readme_names_what_exists() -> None:
    tree = re.search(r"^```text\n(.*?)^```$", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    assert tree is not None
    starts = [re.split(r"\s{2,}", line.strip())[0] for line in tree.group(1).splitlines() if line[:4].strip()]
    named = [path.rstrip("/") for start in starts for path in start.split()]
    assert len(named) > 20
    assert [path for path in named if not any((home / path).exists() for home in HOMES)] == []


def test_the_index_links_every_page() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    linked = set(re.findall(r"\]\(([\w.]+\.md)\)", index))
    assert linked == {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"}
