"""The passkey task: one number in sentences that say nothing, after Mohtashami & Jaggi (arXiv 2305.16300)."""

from __future__ import annotations

import random
from pathlib import Path

from nested_learning.eval.haystack import NOISE, Sample
from nested_learning.eval.loading import Loaded
from nested_learning.eval.memorize import Memorize
from nested_learning.eval.results import Result
from nested_learning.eval.retrieval import Grid, retrieve

TASK = "passkey"
MAX_NEW_TOKENS = 16
PROMPT = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
    "I will quiz you about the important information there.\n{context}\n"
    "What is the pass key? The pass key is"
)
FACT = "The pass key is {key}. Remember it. {key} is the pass key."


def passkey_prompt(size: int, depth: float, rng: random.Random) -> Sample:
    """A passkey of five digits in `size` lines of noise, of which the part `depth`, 0 to 1, is before it."""
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    key = str(rng.randint(10_000, 99_999))
    before = round(depth * size)
    lines = [" ".join(NOISE)] * size
    lines.insert(before, FACT.format(key=key))
    prompt = PROMPT.format(context="\n".join(lines))
    return Sample(prompt=prompt, answers=(key,), depths=(before / size,))


def evaluate_passkey(loaded: Loaded, grid: Grid, output: Path, memorize: Memorize | None = None) -> Result:
    """Ask for passkeys; an answer is right if the generated text contains the number.

    Args:
        grid: its only task is "passkey".
        memorize: also by a model that learns while it reads.

    Raises:
        ValueError: another task, or a context length without room for a prompt.
    """
    if grid.tasks != (TASK,):
        raise ValueError(f"tasks must be {TASK}, got {', '.join(grid.tasks)}")

    def build(task: str, size: int, depth: float | None, rng: random.Random) -> Sample:
        return passkey_prompt(size, depth or 0.0, rng)

    about = {"evaluation": TASK, "score": "accuracy", "chance": 0.0}
    return retrieve(loaded, grid, build, memorize, output, about)
