"""Elastic weight consolidation: weights that mattered to earlier tasks are held (arXiv 1612.00796, Eq. 3)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from nested_learning.train.objective import next_token_loss


@dataclass(frozen=True, kw_only=True, slots=True)
class Anchor:
    """Weights after a task, and how much each mattered to it: the diagonal of the empirical Fisher matrix."""

    weights: dict[str, Tensor]
    importance: dict[str, Tensor]


def anchor(model: nn.Module, samples: Iterable[tuple[Tensor, Tensor]]) -> Anchor:
    """The mean over samples of the squared gradient of −log p(targets), summed over the targets of a sample.

    Args:
        model: called as `logits, state = model(inputs)`.
        samples: inputs and targets `[1, T]` of the task just learned; a target of -100 is not counted.
    """
    named = dict(model.named_parameters())
    total = {name: torch.zeros_like(parameter) for name, parameter in named.items()}
    count = 0
    for inputs, targets in samples:
        loss = next_token_loss(model(inputs)[0], targets, count=1)
        gradients = torch.autograd.grad(loss, list(named.values()), materialize_grads=True)
        for name, gradient in zip(named, gradients, strict=True):
            total[name] += gradient.square()
        count += 1
    return Anchor(
        weights={name: parameter.detach().clone() for name, parameter in named.items()},
        importance={name: values / max(1, count) for name, values in total.items()},
    )


def elastic_penalty(anchors: list[Anchor], strength: float, model: nn.Module) -> Tensor:
    """strength / 2 · Σ over anchors and weights of F · (θ − θ*)², a scalar."""
    named = dict(model.named_parameters())
    terms = [
        (old.importance[name] * (named[name] - weight).square()).sum()
        for old in anchors
        for name, weight in old.weights.items()
    ]
    return strength / 2 * torch.stack(terms).sum()


def penalty_of(anchors: list[Anchor], strength: float) -> partial[Tensor] | None:
    """`elastic_penalty` as a function of the model, for a training loop; None without anchors."""
    return partial(elastic_penalty, list(anchors), strength) if anchors and strength else None
