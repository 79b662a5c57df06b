"""Ways to learn new classes task by task with a pretrained language model.

A text of a class becomes `Query: <text>\\nIntent: <label>`. A language model answers with the class whose
label has the highest mean log-probability per token after `Intent:`.

Shapes: B batch, T tokens, D width of the model.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from nested_learning.checks import at_least
from nested_learning.data.padding import IGNORE
from nested_learning.data.tokenizer import Tokenizer
from nested_learning.eval.arms import Memorize, Memorizer
from nested_learning.eval.intents import Example
from nested_learning.eval.loading import Loaded
from nested_learning.eval.scorer import Scorer
from nested_learning.eval.tokenizers import encode_long
from nested_learning.models.lm import HopeLM
from nested_learning.optim.config import OptimConfig
from nested_learning.train.elastic import Anchor, anchor, penalty_of
from nested_learning.train.plain_loop import Batch, Loop, train_steps

QUERY = "Query: {text}\nIntent:"


class ClassLearner(Protocol):
    """Learns classes task by task, and predicts classes without being given the task."""

    def learn(self, examples: Sequence[Example]) -> None:
        """Learn from the examples of a new task."""
        ...

    def predict(self, text: str, candidates: Sequence[str]) -> str:
        """The likeliest of `candidates`."""
        ...


def label_text(label: str) -> str:
    """A label as it stands after `Intent:`."""
    return " " + label.replace("_", " ")


def as_line(example: Example) -> str:
    """An example as text that ends with a newline."""
    return f"{QUERY.format(text=example.text)}{label_text(example.label)}\n"


def label_scores(
    model: HopeLM, tokenizer: Tokenizer, text: str, candidates: Sequence[str], state: Any = None
) -> list[float]:
    """Mean log-probability per token of every candidate's label after the query.

    Args:
        state: a state of one row in which the query begins, which is not changed; None = an empty context.
    """
    device = next(model.parameters()).device
    scorer = Scorer(model, tokenizer, batch_size=len(candidates), start=state, device=device)
    prompt = encode_long(tokenizer, QUERY.format(text=text))
    labels = [encode_long(tokenizer, label_text(candidate)) for candidate in candidates]
    scores = dict(scorer.loglikelihood_of_ids([(prompt, label) for label in labels]))
    return [scores[i][0] / len(label) for i, label in enumerate(labels)]


def likeliest(
    model: HopeLM, tokenizer: Tokenizer, text: str, candidates: Sequence[str], state: Any = None
) -> str:
    """The candidate with the highest of the `label_scores`."""
    scores = label_scores(model, tokenizer, text, candidates, state)
    return candidates[scores.index(max(scores))]


@dataclass(frozen=True, kw_only=True, slots=True)
class FineTuning:
    """How a model is trained on a task.

    Args:
        optim: the optimizer; every task begins with a new one.
        epochs: passes over the examples of a task.
        batch_size: examples per step.
        replay: share of a batch that is drawn from a memory of earlier tasks; 0 = none.
        memory_per_class: examples of a class that are kept for replay.
        ewc: strength of elastic weight consolidation; 0 = none.
        seed: seed of the order of examples and of the memory.
    """

    optim: OptimConfig
    epochs: int = 5
    batch_size: int = 16
    replay: float = 0.0
    memory_per_class: int = 5
    ewc: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "memory_per_class"):
            at_least(name, getattr(self, name), 1)
        if not 0 <= self.replay < 1 or self.ewc < 0:
            raise ValueError(f"replay must be in [0, 1) and ewc at least 0, got {self.replay} and {self.ewc}")


class FineTuned:
    """A copy of the model that is trained on the labels of every task: naively, with replay or with EWC."""

    def __init__(self, loaded: Loaded, how: FineTuning) -> None:
        self.model: HopeLM = copy.deepcopy(loaded.model).requires_grad_(True)
        self.tokenizer = loaded.tokenizer
        self.how = how
        self._rng = random.Random(how.seed)
        self._memory: list[Example] = []
        self._anchors: list[Anchor] = []

    def learn(self, examples: Sequence[Example]) -> None:
        """Train on the labels of `examples` and of examples in the memory."""
        how = self.how
        steps = how.epochs * -(-len(examples) // how.batch_size)
        loop = Loop(steps=steps, eval_every=steps)
        penalty = penalty_of(self._anchors, how.ewc)
        with torch.enable_grad():
            batches = self._batches(list(examples))
            train_steps(self.model, batches, how.optim, loop, lambda _: 0.0, lambda _: None, penalty)
            if how.ewc:
                self._anchors.append(anchor(self.model, (self._batch([one]) for one in examples)))
        self._remember(examples)

    def predict(self, text: str, candidates: Sequence[str]) -> str:
        """By the likelihood of labels."""
        return likeliest(self.model, self.tokenizer, text, candidates)

    def _batches(self, examples: list[Example]) -> Iterator[Batch]:
        size = self.how.batch_size
        old = round(self.how.replay * size) if self._memory else 0
        while True:
            self._rng.shuffle(examples)
            for start in range(0, len(examples), size):
                new = examples[start : start + size]
                yield self._batch([*new, *self._rng.choices(self._memory, k=old)] if old else new)

    def _batch(self, examples: list[Example]) -> Batch:
        """Inputs and targets `[B, T]`; only tokens of labels are targets."""
        prompts = [encode_long(self.tokenizer, QUERY.format(text=example.text)) for example in examples]
        labels = [encode_long(self.tokenizer, label_text(example.label)) for example in examples]
        longest = max(len(a) + len(b) for a, b in zip(prompts, labels, strict=True))
        device = next(self.model.parameters()).device
        rows = torch.zeros(len(examples), longest, dtype=torch.int64, device=device)
        targets = torch.full_like(rows, IGNORE)
        for i, (prompt, label) in enumerate(zip(prompts, labels, strict=True)):
            rows[i, : len(prompt) + len(label)] = torch.tensor(prompt + label, device=device)
            targets[i, len(prompt) : len(prompt) + len(label)] = torch.tensor(label, device=device)
        return rows[:, :-1], targets[:, 1:]

    def _remember(self, examples: Sequence[Example]) -> None:
        """Keep some examples of every new class."""
        for label in dict.fromkeys(example.label for example in examples):
            own = [example for example in examples if example.label == label]
            self._memory += self._rng.sample(own, min(len(own), self.how.memory_per_class))


class ClassMeans:
    """A frozen encoder, class means, and one covariance for all classes: linear discriminant analysis.

    The features of a text are the mean over its tokens of the last hidden state (after the norm). Only sums
    are kept, so the order of the tasks makes no difference and nothing is forgotten.

    Args:
        shrink: s of the covariance (1 − s) Σ + s tr(Σ) / D · I.
    """

    def __init__(self, loaded: Loaded, shrink: float = 0.1) -> None:
        if not 0 <= shrink <= 1:
            raise ValueError(f"shrink must be in [0, 1], got {shrink}")
        self.loaded = loaded
        self.shrink = shrink
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        dim = loaded.config.model.dim
        self._outer = torch.zeros(dim, dim, dtype=torch.float64, device=loaded.device)
        self._weights: Tensor | None = None  # inverse covariance, made at the first prediction after learning

    def learn(self, examples: Sequence[Example]) -> None:
        """Add to the sums."""
        for example in examples:
            x = self.features(example.text)
            self._sums[example.label] = self._sums.get(example.label, torch.zeros_like(x)) + x
            self._counts[example.label] = self._counts.get(example.label, 0) + 1
            self._outer += torch.outer(x, x)
        self._weights = None

    def predict(self, text: str, candidates: Sequence[str]) -> str:
        """The class whose mean has the smallest Mahalanobis distance."""
        if self._weights is None:
            self._weights = torch.linalg.inv(self.covariance())
        means = torch.stack([self._sums[name] / self._counts[name] for name in candidates])
        off = means - self.features(text)
        return candidates[int((off @ self._weights * off).sum(1).argmin())]

    def covariance(self) -> Tensor:
        """The shrunk covariance within classes, `[D, D]`, float64."""
        within = self._outer.clone()
        for name, total in self._sums.items():
            within -= torch.outer(total, total) / self._counts[name]
        within /= max(1, sum(self._counts.values()) - len(self._counts))
        size = torch.trace(within) / len(within)
        eye = torch.eye(len(within), dtype=within.dtype, device=within.device)
        return (1 - self.shrink) * within + (self.shrink * size + 1e-12) * eye

    @torch.no_grad()
    def features(self, text: str) -> Tensor:
        """`[D]`, float64."""
        seen: list[Tensor] = []
        handle = self.loaded.model.norm.register_forward_hook(lambda *call: seen.append(call[2]))
        try:
            tokens = encode_long(self.loaded.tokenizer, text) or [self.loaded.tokenizer.eos_id]
            self.loaded.model(torch.tensor([tokens], device=self.loaded.device))
        finally:
            handle.remove()
        return seen[0][0].double().mean(0)


class InContext:
    """Reads examples before the query and learns nothing: as many of every class as fit into a context.

    Args:
        context_tokens: most tokens of the examples.
    """

    def __init__(self, loaded: Loaded, context_tokens: int) -> None:
        if context_tokens < 1:
            raise ValueError(f"context_tokens must be at least 1, got {context_tokens}")
        self.loaded = loaded
        self.context_tokens = context_tokens
        self._examples: list[Example] = []
        self._state: Any = None

    def learn(self, examples: Sequence[Example]) -> None:
        """Read examples again, now with those of the new classes."""
        self._examples += examples
        scorer = Scorer(self.loaded.model, self.loaded.tokenizer, device=self.loaded.device)
        self._state = scorer.read([self._context()], None)

    def predict(self, text: str, candidates: Sequence[str]) -> str:
        """By the likelihood of labels after the examples."""
        return likeliest(self.loaded.model, self.loaded.tokenizer, text, candidates, self._state)

    def _context(self) -> list[int]:
        """The first example of every class, then the second, … while they fit; at least one."""
        groups: dict[str, list[Example]] = {}
        for example in self._examples:
            groups.setdefault(example.label, []).append(example)
        rounds = max(map(len, groups.values()))
        lines = [as_line(own[i]) for i in range(rounds) for own in groups.values() if i < len(own)]
        tokens: list[int] = []
        for line in lines:
            new = encode_long(self.loaded.tokenizer, line)
            if tokens and len(tokens) + len(new) > self.context_tokens:
                break
            tokens += new
        return tokens[: self.context_tokens]


class Memorizing:
    """Reads the examples of every task once and learns from the loss of what it reads (`adapt`).

    A query begins in a new context that keeps what was learned. With `--memorize-no-reset`, the memory is
    kept from task to task; otherwise every task begins with the model as trained.
    """

    def __init__(self, loaded: Loaded, memorize: Memorize) -> None:
        if memorize.use_correct_answer:
            raise ValueError("--memorize-use-correct-answer: labels of training examples are learned anyway")
        self.loaded = loaded
        self.memorizer = Memorizer(loaded.model, memorize)
        self._memory: Any = None

    def learn(self, examples: Sequence[Example]) -> None:
        """Read and learn."""
        lines = encode_long(self.loaded.tokenizer, "".join(map(as_line, examples)))
        state = self.memorizer.read(torch.tensor([lines], device=self.loaded.device))
        self._memory = self.memorizer.memory(state)

    def predict(self, text: str, candidates: Sequence[str]) -> str:
        """By the likelihood of labels."""
        return likeliest(self.loaded.model, self.loaded.tokenizer, text, candidates, self._memory)
