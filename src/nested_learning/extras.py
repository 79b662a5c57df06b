"""The distribution this package comes in, and packages that come with its extras only."""

from __future__ import annotations

from importlib import metadata

DISTRIBUTION = "nested-learning-torch"
"""The import name, nested_learning, is the name of somebody else's distribution too."""

EXTRAS = {
    "titans_pytorch": "bench",
    "lm_eval": "eval",
    "deepspeed": "deepspeed",
    "transformers": "hf",
    "nbmake": "notebooks",
    "sklearn": "digits",
}
"""Name of an optional package, as it is imported → the extra that brings it."""


class MissingExtraError(ImportError):
    """What was asked for needs an optional package that is not installed.

    Args:
        what: was asked for, such as "pretrained models".
        package: a key of `EXTRAS`.
    """

    def __init__(self, what: str, package: str) -> None:
        extra = EXTRAS[package]
        super().__init__(
            f"{what}: {package} is not installed; it comes with the extra {extra}: "
            f"uv sync --extra {extra}, or pip install -e '.[{extra}]', in a clone of the repository",
            name=package,
        )


def own_version() -> str:
    """Version of the installed distribution."""
    return metadata.version(DISTRIBUTION)
