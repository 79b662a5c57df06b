"""Losses of texts in every arm: the model as trained, and the model that learns while it reads."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from nested_learning.adapt.paths import Adaptable
from nested_learning.eval.arms import BASELINE, Memorize, Memorizer
from nested_learning.eval.scorer import read_losses


class TextReader:
    """Reads texts in every arm.

    In the adapted arm, every chunk is scored and then learned from. With the right answer, the whole text is
    learned first, and then it is read in a new context.

    Args:
        model: the model.
        memorize: how it learns; None = the baseline only.
    """

    def __init__(self, model: Adaptable, memorize: Memorize | None) -> None:
        self.model = model
        self.memorizer = None if memorize is None else Memorizer(model, memorize)

    def losses(self, tokens: Tensor) -> dict[str, Tensor]:
        """Losses `[B, T]` in nats of `tokens [B, T+1]`, by arm."""
        found = {BASELINE: read_losses(self.model, tokens)}
        if self.memorizer is not None:
            losses, state = self.learn(tokens)
            if self.memorizer.how.use_correct_answer:
                losses = read_losses(self.model, tokens, self.memorizer.memory(state))
            found[self.memorizer.how.arm] = losses
        return found

    def learn(self, tokens: Tensor) -> tuple[Tensor, Any]:
        """Learn from a text. Returns its losses `[B, T]`, scored before learning, and the state after."""
        assert self.memorizer is not None
        return self.memorizer.losses(tokens)
