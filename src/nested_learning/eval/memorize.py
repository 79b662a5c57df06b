"""Evaluating a model that may learn from what it is shown: the `--memorize` options of every evaluator.

With `--memorize` an evaluator scores every sample twice: by the model as it was trained ("baseline") and by
the model after it has memorized what the sample shows ("adapted"). The right answer is part of that only
with `--memorize-use-correct-answer`, and then the arm is called "adapted, gold text".
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from nested_learning.adapt.config import PATHS, AdaptConfig
from nested_learning.adapt.memorize import memorize
from nested_learning.adapt.paths import Adaptable, restart, start
from nested_learning.eval.results import ADAPTED, GOLD

FIELDS = {
    "memorize_steps": "steps",
    "memorize_paths": "paths",
    "memorize_lr": "lr",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Memorize:
    """How a model learns while it is evaluated.

    Args:
        adapt: how; `adapt.reset` = forget between samples.
        use_correct_answer: the text to learn from contains the right answer.
    """

    adapt: AdaptConfig = field(default_factory=AdaptConfig)
    use_correct_answer: bool = False

    @property
    def arm(self) -> str:
        """Name of the arm of the metrics."""
        return GOLD if self.use_correct_answer else ADAPTED

    def settings(self) -> dict[str, Any]:
        """For the result file."""
        return {**asdict(self.adapt), "use_correct_answer": self.use_correct_answer}

    def read(self, model: Adaptable, tokens: Tensor, state: Any = None) -> Any:
        """Read all of `tokens [B, T]` and learn from them: the state behind the last one.

        Like `model(tokens, state)`, but learning, so its context can be continued. Every token but the first
        is learned from. `state` = None starts a context; it may be a state of this method or `memory`.
        """
        state = start(model, tokens.shape[0], self.adapt) if state is None else state
        if tokens.shape[1] > 1:
            _, state = memorize(model, tokens, state, self.adapt)
        with torch.no_grad():  # `memorize` reads up to the last but one
            _, state = model(tokens[:, -1:], state)
        return state

    def memory(self, model: Adaptable, state: Any) -> Any:
        """The start of a new context that keeps what `state` has learned, and nothing else of it."""
        return restart(model, state, self.adapt.paths)

    def carried(self, model: Adaptable, state: Any) -> Any:
        """With what the next sample begins: None, or with `--memorize-no-reset` what was learned so far."""
        return None if self.adapt.reset else self.memory(model, state)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The `--memorize` options."""
    default = AdaptConfig()
    add = parser.add_argument_group("learning at test time (docs/adaptation.md)").add_argument
    add("--memorize", action="store_true", help="score also a model that has memorized what it was shown")
    add("--memorize-steps", type=int, help=f"gradient steps on a chunk (default {default.steps})")
    add("--memorize-lr", type=float, help=f"step size (default {default.lr})")
    add("--memorize-paths", choices=PATHS, help=f"weights that learn (default {default.paths})")
    threshold = "--memorize-surprise-threshold"
    add(threshold, type=float, help="learn only from chunks whose surprise (l2, 0 to 1.41) reaches it")
    add("--memorize-no-reset", action="store_true", help="keep what was learned for the next samples")
    answer = "--memorize-use-correct-answer"
    add(answer, action="store_true", help="memorize the right answers too; marked in the result")


def from_options(options: argparse.Namespace) -> Memorize | None:
    """What the options of `add_options` ask for; None without `--memorize`.

    Raises:
        ValueError: an option without `--memorize`, or a value that is not allowed.
    """
    given = {name: value for name, value in vars(options).items() if name.startswith("memorize_")}
    used = [name for name, value in given.items() if value is not None and value is not False]
    if not options.memorize:
        if used:
            raise ValueError(f"--{used[0].replace('_', '-')} needs --memorize")
        return None
    values: dict[str, Any] = {field: given[name] for name, field in FIELDS.items() if given[name] is not None}
    if options.memorize_surprise_threshold is not None:
        values |= {"surprise": "l2", "threshold": options.memorize_surprise_threshold}
    adapt = AdaptConfig(reset=not options.memorize_no_reset, **values)
    return Memorize(adapt=adapt, use_correct_answer=options.memorize_use_correct_answer)
