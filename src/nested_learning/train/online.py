"""The training loss of a model that learns while it reads (`train.inner=online`).

A sequence is read chunk by chunk, and the fast weights learn from the loss of each chunk before the next one
is read. The outer loss is that of every token before it is learned from, so parameters are trained as a start
that learns well. What is written belongs to one sequence: with several processes nothing of it is shared.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from nested_learning.adapt.config import AdaptConfig
from nested_learning.adapt.learn import Learner
from nested_learning.adapt.memorize import memorize, split_chunks
from nested_learning.adapt.paths import learning_names, start
from nested_learning.train.objective import count_targets


def online_loss(
    model: nn.Module,
    tokens: Tensor,
    config: AdaptConfig,
    through_write: bool = False,
    count: int | None = None,
) -> Tensor:
    """Cross-entropy in nats of `tokens [B, T+1]`, read and learned from chunk by chunk.

    Args:
        model: `HopeLM`, or a wrapper that holds one as `module` (DDP).
        config: what learns, and how. Every sequence starts from the parameters.
        through_write: differentiate through the inner gradients too (second order). Compiled layers cannot
            be differentiated twice.
        count: divisor of the summed loss; None = the number of targets.

    Returns:
        A scalar. Without gradients enabled, its value only.
    """
    divisor = count_targets(tokens[:, 1:]).clamp(min=1) if count is None else max(1, count)
    called: Any = model
    inside: Any = getattr(model, "module", model)
    if not torch.is_grad_enabled():
        return memorize(inside, tokens, None, config)[0].losses.sum() / divisor
    state = start(inside, tokens.shape[0], config)
    names = learning_names(inside, state, config)
    learner = Learner(
        model=called,
        config=config,
        names=names,
        initial=state,
        graph="through" if through_write else "first_order",
    )
    losses = []
    with sdpa_kernel(SDPBackend.MATH) if through_write else nullcontext():
        *chunks, last = split_chunks(tokens, config.chunk_size)
        for inputs, targets in chunks:
            chunk = learner.read(inputs, targets, state)
            losses.append(chunk.losses.sum())
            state = chunk.state
        losses.append(replace(learner, names=[]).read(*last, state).losses.sum())
    return torch.stack(losses).sum() / divisor
