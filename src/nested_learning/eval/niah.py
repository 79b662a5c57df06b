"""RULER's needle-in-a-haystack tasks on a checkpoint (see `eval.haystack` for how they are built)."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

from nested_learning.checks import one_of
from nested_learning.eval.haystack import TASKS, Sample, essay_words, needle_prompt
from nested_learning.eval.loading import Loaded
from nested_learning.eval.memorize import Memorize
from nested_learning.eval.results import Result
from nested_learning.eval.retrieval import Grid, retrieve

MAX_NEW_TOKENS = 128


def evaluate_niah(
    loaded: Loaded, grid: Grid, output: Path, haystack: Path | None = None, memorize: Memorize | None = None
) -> Result:
    """Ask for needles; the score of a sample is the part of its answers that the generated text contains.

    Args:
        grid: its tasks are keys of `haystack.TASKS`.
        haystack: text to cut essays from; None = the bundled speeches.
        memorize: also by a model that learns while it reads.

    Raises:
        ValueError: an unknown task, or a context length without room for a prompt.
        FileNotFoundError: no such text.
    """
    for task in grid.tasks:
        one_of("--tasks", task, TASKS)
    words = essay_words(haystack)

    def build(task: str, size: int, depth: float | None, rng: random.Random) -> Sample:
        return needle_prompt(TASKS[task], words, size, depth, rng)

    about = {
        "evaluation": "niah",
        "score": "string_match_all",
        "chance": 0.0,
        "haystack": hashlib.sha256(" ".join(words).encode()).hexdigest(),
    }
    return retrieve(loaded, grid, build, memorize, output, about)
