"""The two things small models are trained on here: key-value recall, and the bundled text.

Shapes: B batch, T tokens, V vocabulary; tokens and targets `[B, T]` int64, logits `[B, T, V]`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nested_learning.config import load_config
from nested_learning.data.config import DataConfig
from nested_learning.data.corpus import Corpus, load_corpus
from nested_learning.data.loader import TokenLoader, sequential_batches
from nested_learning.data.padding import IGNORE
from nested_learning.data.shards import TokenArray, Tokens
from nested_learning.data.synthetic.recall import recall_batch
from nested_learning.models.config import HopeConfig
from nested_learning.models.lm import HopeLM
from nested_learning.optim.config import OptimConfig
from nested_learning.reproduce.runner import Result, Tick
from nested_learning.runtime import set_seed
from nested_learning.train.plain_loop import Batch, Loop, device_of, finite_or_none, train_steps

Readable = TokenArray | Tokens
SOLVED = 0.95
"""Accuracy from which recall counts as learned."""
EIGHTHS = 8


def recall_model() -> HopeConfig:
    """The model of the recall experiments: 2 layers of width 64, a write every 8 tokens, one plain MLP."""
    return HopeConfig(vocab_size=64, dim=64, num_layers=2, num_heads=2, chunk_size=8)


def recall_optim() -> OptimConfig:
    """AdamW at a constant rate after a warm-up of 50 steps."""
    return OptimConfig(lr=3e-3, weight_decay=0.01, schedule="constant", warmup_steps=50)


@dataclass(frozen=True, kw_only=True, slots=True)
class AnswerRun(ABC):
    """One training on sequences that are drawn anew all along and have answers at some of their positions.

    Args:
        batch_size, steps, seed: of the training; the seed decides the initial weights and all data.
        eval_every, eval_batches: steps between evaluations, and batches (of 4 · batch_size) in each.
        stop_at: held-out accuracy that ends the run early; None = never.
    """

    model: HopeConfig = field(default_factory=recall_model)
    optim: OptimConfig = field(default_factory=recall_optim)
    steps: int = 1500
    seed: int = 0
    batch_size: int = 32
    eval_every: int = 50
    eval_batches: int = 8
    stop_at: float | None = 0.99

    @abstractmethod
    def draw(self, size: int, generator: torch.Generator) -> Batch:
        """`size` sequences and their targets, IGNORE where nothing is asked."""

    def build(self) -> nn.Module:
        """The model to train."""
        return HopeLM(self.model)

    def run(self, tick: Tick) -> Result:
        """Train. The result holds `final` (accuracy on fresh sequences), `solved` (first evaluated step
        with a held-out accuracy of at least 0.95, or None), and the history of the loop."""
        set_seed(self.seed)
        model = self.build()
        held_out = self.batches(1, self.eval_batches)

        def evaluate(trained: nn.Module) -> float:
            return recall_accuracy(trained, held_out)

        loop = Loop(steps=self.steps, eval_every=self.eval_every, stop_at=self.stop_at)
        history = train_steps(model, self._training_batches(), self.optim, loop, evaluate, tick)
        solved = next((step for step, accuracy in history.curve if accuracy >= SOLVED), None)
        final = recall_accuracy(model.cpu(), self.batches(2, self.eval_batches))
        parameters = sum(p.numel() for p in model.parameters())
        return {"final": final, "solved": solved, "parameters": parameters, **history.to_result()}

    def batches(self, part: int, count: int) -> list[Batch]:
        """The first `count` large batches of `part`: 1 = held out during training, 2 = the final ones."""
        generator = self._generator(part)
        return [self.draw(4 * self.batch_size, generator) for _ in range(count)]

    def _training_batches(self) -> Iterator[Batch]:
        generator = self._generator(0)
        while True:
            yield self.draw(self.batch_size, generator)

    def _generator(self, part: int) -> torch.Generator:
        return torch.Generator().manual_seed(3 * self.seed + part)


@dataclass(frozen=True, kw_only=True, slots=True)
class RecallRun(AnswerRun):
    """One training on multi-query key-value recall (`data.synthetic.recall`).

    Args:
        model: its vocabulary is half keys, half values.
        pairs: key-value pairs per sequence.
        overwritten: keys that are stated twice, with two values; T = 4 · pairs + 2 · overwritten.
    """

    pairs: int = 8
    overwritten: int = 0

    def draw(self, size: int, generator: torch.Generator) -> Batch:
        """`size` sequences of recall."""
        return recall_batch(size, self.pairs, self.model.vocab_size, generator, self.overwritten)


@torch.no_grad()
def recall_accuracy(model: nn.Module, batches: Iterable[Batch]) -> float:
    """Share of queries in `(tokens [B, T], targets [B, T])` whose value is the likeliest of all tokens."""
    right = asked = 0
    for tokens, targets in batches:
        is_query = targets != IGNORE
        answers = model(tokens)[0].argmax(-1)
        right += int((answers == targets)[is_query].sum())
        asked += int(is_query.sum())
    return right / asked


@dataclass(frozen=True, kw_only=True, slots=True)
class TextRun:
    """One training on text, next token by next token.

    Args:
        model, optim, data: as in a configuration of `train.py`.
        seq_len, batch_size: tokens per sequence, sequences per step.
        steps, seed: of the training; the seed decides the initial weights and the order of the data.
        eval_every: steps between evaluations.
        eval_tokens: tokens of the held-out part in each, the same ones every time.
        shift: files of another text, as in `data.files`; the trained model reads its held-out part too.
    """

    model: HopeConfig
    optim: OptimConfig
    data: DataConfig
    seq_len: int
    batch_size: int
    steps: int
    seed: int = 0
    eval_every: int = 50
    eval_tokens: int = 32_768
    shift: tuple[str, ...] = ()

    def run(self, tick: Tick) -> Result:
        """Train. The result holds `final` (validation loss, nats per token; None if not finite),
        `by_position` (the same for every eighth of the sequence), `shifted` (that of the text of `shift`;
        None without one), `unigram_entropy`, `bytes_per_token`, and the history of the loop."""
        return self.trained(tick)[1]

    def trained(self, tick: Tick) -> tuple[HopeLM, Result]:
        """Train. The model, and what `run` says of it."""
        corpus = load_corpus(self.data)
        set_seed(self.seed)
        model = HopeLM(self.model)
        loader = TokenLoader(corpus.train, self.seq_len, self.batch_size, self.seed)
        batches = ((tokens[:, :-1], tokens[:, 1:]) for tokens in loader)
        count = max(1, self.eval_tokens // (self.seq_len * self.batch_size))

        def positions(trained: nn.Module, tokens: Readable) -> Tensor:
            held_out = sequential_batches(tokens, self.seq_len, self.batch_size, count)
            return loss_by_position(trained, held_out)

        def evaluate(trained: nn.Module) -> float:
            return float(positions(trained, corpus.valid).mean())

        def by_eighth(tokens: Readable) -> list[float | None]:
            return [finite_or_none(float(p.mean())) for p in positions(model, tokens).chunk(EIGHTHS)]

        loop = Loop(steps=self.steps, eval_every=self.eval_every)
        history = train_steps(model, batches, self.optim, loop, evaluate, tick)
        return model, {
            "final": finite_or_none(history.curve[-1][1]),
            "by_position": by_eighth(corpus.valid),
            "shifted": by_eighth(shifted_text(self.data, self.shift).valid) if self.shift else None,
            "bytes_per_token": corpus.bytes_per_token,
            "unigram_entropy": corpus.unigram_entropy,
            "parameters": sum(p.numel() for p in model.parameters()),
            **history.to_result(),
        }


def shifted_text(data: DataConfig, files: tuple[str, ...]) -> Corpus:
    """Another text, in the tokens of `data`."""
    return load_corpus(replace(data, files=files, shards=None), own=load_corpus(data).tokenizer)


@torch.no_grad()
def loss_by_position(model: nn.Module, rows: Iterable[Tensor]) -> Tensor:
    """Mean loss at every position `[T]` over rows of tokens `[B, T + 1]`, in nats."""
    losses = []
    for row in rows:
        tokens = row.to(device_of(model))
        logits = model(tokens[:, :-1])[0]
        losses.append(F.cross_entropy(logits.mT.float(), tokens[:, 1:], reduction="none").mean(0))
    return torch.stack(losses).mean(0).cpu()


def pilot_run(steps: int, seed: int = 0) -> TextRun:
    """A run of the model, optimizer, text and batches of `configs/pilot_smoke.yaml`.

    It is evaluated on 16 batches, or on as many as it trains on, if those are fewer.
    """
    config = load_config("pilot_smoke")
    load_corpus(config.data)  # once and here: parallel runs then only open it
    return TextRun(
        model=config.model,
        optim=config.optim,
        data=config.data,
        seq_len=config.train.seq_len,
        batch_size=config.train.batch_size,
        steps=steps,
        seed=seed,
        eval_tokens=config.train.seq_len * config.train.batch_size * min(steps, 16),
    )
