"""Names by which other reproductions of the paper call what has another name here: all of them, in one place.

Command lines, paths and keyword arguments are translated before anything else reads them, so no other module
knows these names.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

UNTRAINED = "untrained"
"""In place of a checkpoint: see `eval.loading.load`."""

OPTIONS = re.compile(r"--local_rank=\d+")
"""What the launcher of DeepSpeed adds to a command line; it sets LOCAL_RANK besides, which is read."""

OVERRIDES = (
    ("logging.enabled=true", "logging.wandb=online"),
    ("logging.backend=wandb", "logging.wandb=online"),
    ("logging.backend=json", "logging.wandb=none"),
    ("logging.enabled=false", "logging.wandb=none"),
    ("deepspeed.config=", "parallel.deepspeed="),
)
"""Beginning of an override → ours; of two that set the same field, the one that stands later here holds."""

KEYWORDS = {"chunk_sizes": "periods"}
"""Keyword argument → ours."""

PATHS = (
    (r"configs/hope/([^/]+)", r"configs/\1"),
    (r"checkpoints/(.+)/step_0*(\d+)\.pt", r"outputs/\1/checkpoints/step_\2"),
    (r"artifacts/examples/pilot_dummy\.pt", UNTRAINED),
    (r"(.*)/spm_\d+_(?:unigram|bpe)\.model", r"\1/tokenizer.model"),
    (
        r"artifacts/tokenizer/[^/]+/spm_\d+_(?:unigram|bpe)\.model",
        "outputs/tokenizers/refinedweb/tokenizer.model",
    ),
    (
        r"artifacts/tokenizer/[^/]+/spm_\d+_(?:unigram|bpe)\.model",
        "outputs/tokenizers/sample_hub/tokenizer.model",
    ),
    (
        r"artifacts/tokenizer/[^/]+/spm_\d+_(?:unigram|bpe)\.model",
        "outputs/tokenizers/sample/tokenizer.model",
    ),
)
"""Pattern of a path → ours, relative to the working directory; the first that is there is taken."""

_STEP = re.compile(r"step_(\d{1,7})$")


def our_arguments(arguments: Sequence[str]) -> list[str]:
    """A command line of `train*.py` in our names: what is translated comes first, so the rest has the last
    word."""
    rest = [argument for argument in arguments if not OPTIONS.fullmatch(argument)]
    translated = []
    for theirs, ours in OVERRIDES:
        for argument in [a for a in rest if _matches(a, theirs)]:
            rest.remove(argument)
            translated.append(ours + argument[len(theirs) :])
    first = next((i for i, argument in enumerate(rest) if "=" in argument and argument[0] != "-"), len(rest))
    return [*rest[:first], *translated, *rest[first:]]


def our_keywords(function: Callable[P, T]) -> Callable[P, T]:
    """`function`, which also takes keyword arguments by the names in `KEYWORDS`."""

    @wraps(function)
    def translated(*args: P.args, **kwargs: P.kwargs) -> T:
        for theirs, ours in KEYWORDS.items():
            if theirs in kwargs and ours not in kwargs:
                kwargs[ours] = kwargs.pop(theirs)
        return function(*args, **kwargs)

    return translated


def our_path(path: str | Path) -> str:
    """`path` itself if it is there or nothing stands for it, else what does, with a line on stderr."""
    name = str(path)
    if Path(name).exists():
        return name
    for pattern, ours in PATHS:
        if found := re.fullmatch(pattern, name.removeprefix("./")):
            there = _STEP.sub(lambda step: f"step_{int(step[1]):08d}", found.expand(ours))
            if there == UNTRAINED or Path(there).exists():
                print(f"{name} is not there; taking {there}", file=sys.stderr)
                return there
    return name


def _matches(argument: str, theirs: str) -> bool:
    return argument.startswith(theirs) if theirs.endswith("=") else argument.lower() == theirs
