"""Where the configurations are: in a clone beside the package, in a wheel inside of it."""

from __future__ import annotations

from pathlib import Path

from nested_learning.checks import near_path

PACKAGE = Path(__file__).resolve().parent


def config_folder() -> Path:
    """The folder that `configs/` stands for in commands and pages.

    Raises:
        FileNotFoundError: the package was installed without it.
    """
    for folder in (PACKAGE / "configs", PACKAGE.parents[1] / "configs"):
        if (folder / "base.yaml").is_file():
            return folder
    raise FileNotFoundError(f"no folder configs in {PACKAGE}, nor beside it: the package is not whole")


def config_file(path: str | Path, field: str) -> Path:
    """A file that a field of a configuration names: as it stands, or `configs/...` of this package.

    Raises:
        FileNotFoundError: there is no such file.
    """
    path = Path(path)
    if path.is_file():
        return path
    if path.parts[:1] == ("configs",) and (own := config_folder().joinpath(*path.parts[1:])).is_file():
        return own
    raise FileNotFoundError(f"{field}: there is no file {path}{near_path(path)}")


def in_a_clone() -> bool:
    """Whether the package is used from a clone of its repository, where commands begin with `uv run`."""
    return (PACKAGE.parents[1] / "pyproject.toml").is_file()
