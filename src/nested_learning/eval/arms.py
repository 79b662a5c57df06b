"""The arms of an evaluation: the model as trained, and the model after it has memorized what it was shown.

With `--memorize` an evaluation scores every sample twice: by the model as it was trained ("baseline") and by
the model after it has memorized what the sample shows ("adapted"). The right answer is part of what it
memorizes only with `--memorize-use-correct-answer`, and then the arm is called "adapted, gold text".
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from nested_learning.adapt.config import AdaptConfig
from nested_learning.adapt.memorize import memorize
from nested_learning.adapt.paths import Adaptable, restart, start

BASELINE, ADAPTED, GOLD = "baseline", "adapted", "adapted, gold text"
ARMS = (BASELINE, ADAPTED, GOLD)


@dataclass(frozen=True, kw_only=True, slots=True)
class Memorize:
    """How a model learns while it is evaluated.

    Args:
        adapt: how it learns; `adapt.reset` makes it forget between samples.
        use_correct_answer: whether the text to learn from contains the right answer.
    """

    adapt: AdaptConfig = field(default_factory=AdaptConfig)
    use_correct_answer: bool = False

    @property
    def arm(self) -> str:
        """Name of the arm of the metrics."""
        return GOLD if self.use_correct_answer else ADAPTED

    def settings(self) -> dict[str, Any]:
        """The settings as they stand in a result file."""
        return {**asdict(self.adapt), "use_correct_answer": self.use_correct_answer}

    def read(self, model: Adaptable, tokens: Tensor, state: Any = None) -> Any:
        """Read all of `tokens [B, T]`, learn from them, and return the state after the last one.

        This is `model(tokens, state)` with learning, so the context can be continued. Every token but the
        first is learned from.

        Args:
            state: a state from this method or from `memory`; None starts a context.
        """
        state = start(model, tokens.shape[0], self.adapt) if state is None else state
        if tokens.shape[1] > 1:
            _, state = memorize(model, tokens, state, self.adapt)
        with torch.no_grad():  # `memorize` takes the last token as a target only
            _, state = model(tokens[:, -1:], state)
        return state

    def memory(self, model: Adaptable, state: Any) -> Any:
        """The start of a new context that keeps what `state` has learned and nothing else."""
        return restart(model, state, self.adapt.paths)


class Memorizer:
    """A model that memorizes samples one after the other.

    With `--memorize-no-reset`, each sample begins with what was learned from all earlier ones; otherwise each
    begins with the model as trained.
    """

    def __init__(self, model: Adaptable, how: Memorize) -> None:
        self.model = model
        self.how = how
        self._carried: Any = None

    def read(self, tokens: Tensor) -> Any:
        """Read a sample `tokens [B, T]`, learn from it, and return the state after it."""
        return self._carry(self.how.read(self.model, tokens, self._carried))

    def losses(self, tokens: Tensor) -> tuple[Tensor, Any]:
        """Losses `[B, T]` of `tokens [B, T+1]`, each from before it was learned from; and the state after."""
        report, state = memorize(self.model, tokens, self._carried, self.how.adapt)
        return report.losses, self._carry(state)

    def memory(self, state: Any) -> Any:
        """The start of a new context that keeps what `state` has learned."""
        return self.how.memory(self.model, state)

    def _carry(self, state: Any) -> Any:
        if not self.how.adapt.reset:
            self._carried = self.memory(state)
        return state


def arms_of(how: Memorize | None) -> list[str]:
    """Names of the arms, given how the model learns; None means that it does not."""
    return [BASELINE] if how is None else [BASELINE, how.arm]
