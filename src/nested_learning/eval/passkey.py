"""The passkey task: a number hidden in filler sentences, after Mohtashami & Jaggi (arXiv 2305.16300)."""

from __future__ import annotations

import random

from nested_learning.eval.haystack import NOISE, Grid, Haystack, Retrieval
from nested_learning.eval.loading import Loaded

TASK = "passkey"
MAX_NEW_TOKENS = 16
PROMPT = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
    "I will quiz you about the important information there.\n{context}\n"
    "What is the pass key? The pass key is"
)
FACT = "The pass key is {key}. Remember it. {key} is the pass key."


class Passkey(Retrieval):
    """Asks for passkeys; an answer is right if the generated text contains the number.

    Args:
        loaded: the checkpoint.
        grid: which samples; its only task is "passkey".

    Raises:
        ValueError: another task, or a context length without room for a prompt.
    """

    name = TASK
    metric = "accuracy"

    def __init__(self, loaded: Loaded, grid: Grid) -> None:
        if grid.tasks != (TASK,):
            raise ValueError(f"tasks must be {TASK}, got {', '.join(grid.tasks)}")
        super().__init__(loaded, grid)

    def build(self, task: str, size: int, depth: float, rng: random.Random) -> Haystack:
        """A prompt with `size` lines of filler sentences."""
        return passkey_prompt(size, depth, rng)


def passkey_prompt(size: int, depth: float, rng: random.Random) -> Haystack:
    """A passkey of five digits in `size` lines of filler; the share `depth` of them is before it."""
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    key = str(rng.randint(10_000, 99_999))
    before = round(depth * size)
    lines = [" ".join(NOISE)] * size
    lines.insert(before, FACT.format(key=key))
    prompt = PROMPT.format(context="\n".join(lines))
    return Haystack(prompt=prompt, answers=(key,), depths=(before / size,))
