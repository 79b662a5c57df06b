"""Read a text and learn from it: every token is scored before anything is learned from it.

Shapes: as in training, a text is tokens `[B, T+1]`: the first T are inputs and the last T are targets. To
continue a text, begin the next tokens with the last one of the previous call. Rows may end in padding of
-100, which is neither scored nor learned from.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nested_learning.adapt.config import AdaptConfig
from nested_learning.adapt.learn import Learner, token_losses
from nested_learning.adapt.paths import Adaptable, learning_names, restart, start
from nested_learning.data.loader import split_batch


@dataclass(frozen=True, kw_only=True, slots=True)
class MemorizeReport:
    """The result of reading a text.

    Args:
        losses: `[B, T]`, nats of every target, by weights that had not learned from it; 0 for padding.
        surprise: `[B, chunks]`, in units of `AdaptConfig.surprise`.
        wrote: `[B, chunks]`, whether the row learned from the chunk.
    """

    losses: Tensor
    surprise: Tensor
    wrote: Tensor


def memorize(
    model: Adaptable, tokens: Tensor, state: Any = None, config: AdaptConfig | None = None
) -> tuple[MemorizeReport, Any]:
    """Read `tokens [B, T+1]` chunk by chunk, and learn from every chunk after it was scored.

    The model's parameters are not touched: what is learned is in the state that comes back.

    Args:
        model: see `Adaptable`.
        tokens: int64.
        state: of this function or of the model; None = the start of a context.
        config: what learns, and how.

    Raises:
        ValueError: tokens of another shape, or a model or state without weights that `config.paths` names.
        RuntimeError: called under `torch.inference_mode()`, where nothing can be learned.

    Example:
        >>> report, state = memorize(model, tokens, config=AdaptConfig(paths="cms", lr=0.1))
        >>> again, _ = score(model, tokens, restart(model, state))  # how well is it remembered?
    """
    config = config or AdaptConfig()
    _check(tokens)
    if torch.is_inference_mode_enabled():
        raise RuntimeError("memorize takes gradients: call it under torch.no_grad(), not inference_mode()")
    state = start(model, tokens.shape[0], config) if state is None else state
    state = state.detach()
    learner = Learner(
        model=model,
        config=config,
        names=learning_names(model, state, config),
        initial=start(model, 1, config).detach(),
    )
    chunks = []
    for inputs, targets in split_chunks(tokens, config.chunk_size):
        chunks.append(learner.read(inputs, targets, state))
        state = chunks[-1].state
    report = MemorizeReport(
        losses=torch.cat([chunk.losses for chunk in chunks], 1),
        surprise=torch.stack([chunk.surprise for chunk in chunks], 1),
        wrote=torch.stack([chunk.wrote for chunk in chunks], 1),
    )
    return report, state


def memorize_each(
    model: Adaptable, samples: Iterable[Tensor], config: AdaptConfig | None = None
) -> Iterator[tuple[MemorizeReport, Any]]:
    """`memorize` of one sample after the other, each in a new context.

    With `config.reset` every sample finds the model as it was trained; without, what earlier samples have
    taught the weights of `config.paths`.
    """
    config, state = config or AdaptConfig(), None
    for tokens in samples:
        report, state = memorize(model, tokens, state, config)
        yield report, state
        state = None if config.reset else restart(model, state, config.paths)


@torch.no_grad()
def score(model: Adaptable, tokens: Tensor, state: Any = None) -> tuple[Tensor, Any]:
    """Read `tokens [B, T+1]` at once, learning nothing: losses `[B, T]` in nats, and the state after it."""
    _check(tokens)
    inputs, targets = split_batch(tokens)
    logits, after = model(inputs, state)
    return token_losses(logits, targets), after


def split_chunks(tokens: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    """Inputs and targets of the chunks of `tokens [B, T+1]`, `size` targets each but for the last."""
    inputs, targets = split_batch(tokens)
    return list(zip(torch.split(inputs, size, 1), torch.split(targets, size, 1), strict=True))


def _check(tokens: Tensor) -> None:
    if tokens.dim() != 2 or tokens.shape[1] < 2:
        raise ValueError(
            f"tokens must be [batch, length] with length of at least 2, got {tuple(tokens.shape)}"
        )
