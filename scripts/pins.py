"""The exact versions in pyproject.toml (`constraint-dependencies`) and requirements.txt, made again by uv.
scripts/locked_requirements.txt has them with hashes.

uv run python scripts/pins.py              # after a change of dependencies; keeps the other versions
uv run python scripts/pins.py --upgrade    # the newest versions of everything
"""

from __future__ import annotations

import argparse
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
PINS = re.compile(r"(?<=^constraint-dependencies = \[\n).*?(?=^\]$)", re.MULTILINE | re.DOTALL)
LOCKED = Path("scripts") / "locked_requirements.txt"
LOCKED_HEAD = """\
# Exact versions and hashes of the package and all that it needs, for every platform. Made by scripts/pins.py.
# pip install --require-hashes -r scripts/locked_requirements.txt && pip install --no-deps dist/*.whl
"""
EXPORT = ("--all-extras", "--all-groups", "--no-hashes", "--no-annotate", "--no-header", "--no-emit-project")
LOCKED_EXPORT = ("--no-dev", "--no-annotate", "--no-header", "--no-emit-project")


def with_pins(project: str, pins: Sequence[str]) -> str:
    """The text of pyproject.toml with `pins`, each "name==version" perhaps with a marker, as its own.

    Raises:
        ValueError: it has not exactly one such list.
    """
    lines = "".join(f'    "{pin}",\n' for pin in pins)
    text, found = PINS.subn(lambda match: lines, project)
    if found != 1:
        raise ValueError(f"pyproject.toml must have one list constraint-dependencies, found {found}")
    return text


def with_versions(requirements: str, pins: Sequence[str]) -> str:
    """The text of requirements.txt with the versions of `pins`; packages without a pin stay as they are."""
    by_name: dict[str, list[str]] = {}
    for pin in pins:
        by_name.setdefault(name_of(pin), []).append(pin)
    lines: dict[str, None] = {}  # in order, each once: a package may have a pin per version of Python
    for line in requirements.splitlines():
        lines |= dict.fromkeys(by_name.get(name_of(line), [line]))
    return "".join(f"{line}\n" for line in lines)


def name_of(requirement: str) -> str:
    """The package of a line "name==version ; marker"."""
    return requirement.split("==")[0]


def uv(*arguments: str, folder: Path) -> str:
    """What uv prints; its messages go to standard error."""
    return subprocess.run(
        ["uv", *arguments], cwd=folder, check=True, stdout=subprocess.PIPE, text=True
    ).stdout


def make_pins(folder: Path, upgrade: bool) -> None:
    """Write the versions of a new resolution into pyproject.toml and requirements.txt of `folder`.

    Raises:
        subprocess.CalledProcessError: uv finds no resolution; pyproject.toml is then as it was.
    """
    project, requirements = folder / "pyproject.toml", folder / "requirements.txt"
    before = project.read_text(encoding="utf-8")
    after = before
    try:
        if upgrade:
            project.write_text(with_pins(before, []), encoding="utf-8")
            uv("lock", "--quiet", "--upgrade", folder=folder)
        pins = uv("export", "--quiet", *EXPORT, folder=folder).splitlines()
        after = with_pins(before, pins)
        versions = with_versions(requirements.read_text(encoding="utf-8"), pins)
    finally:
        project.write_text(after, encoding="utf-8")
    requirements.write_text(versions, encoding="utf-8")
    write_locked(folder)


def write_locked(folder: Path) -> None:
    """Write the packages that ours needs, with a hash of every file that their versions came in."""
    locked = uv("export", "--quiet", *LOCKED_EXPORT, folder=folder)
    (folder / LOCKED).parent.mkdir(exist_ok=True)
    (folder / LOCKED).write_text(LOCKED_HEAD + locked, encoding="utf-8")


def main() -> None:
    """Make the pins of this repository."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--upgrade", action="store_true", help="take the newest versions of everything")
    make_pins(ROOT, parser.parse_args().upgrade)


if __name__ == "__main__":
    main()
