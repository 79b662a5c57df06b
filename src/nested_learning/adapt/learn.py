"""One chunk of learning: score it, take gradient steps on its loss, add what they changed to the state.

    L_b = mean of −log p over the targets of row b's chunk
    θ_b ← θ_b − lr · ∂L_b/∂θ_b        `steps` times, if the chunk surprised row b (Eq. 71)

θ are the weights at the chunk's start. Where the forward pass writes to them too (memories, fast levels),
both changes add up. Rows never mix: every weight has the batch as its first dimension.

Shapes: B batch, t tokens of the chunk, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from nested_learning.adapt.config import AdaptConfig
from nested_learning.adapt.paths import Adaptable
from nested_learning.data.padding import IGNORE

Graph = Literal["cut", "first_order", "through"]
Weights = dict[str, Tensor]


class Chunk(NamedTuple):
    """What came of a chunk.

    losses: `[B, t]` nats, from before learning from it; 0 for padding. surprise: `[B]`. wrote: `[B]`,
    whether the row learned. state: after the chunk.
    """

    losses: Tensor
    surprise: Tensor
    wrote: Tensor
    state: Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Learner:
    """Scores chunks and learns from each after it was scored.

    Args:
        model: stays as it is.
        config: how to learn.
        names: the weights of the state that learn; with none of them chunks are only scored.
        graph: what stays open to a later gradient: "cut" (nothing), "first_order" (all but the gradients
            that are written) or "through" (all).
    """

    model: Adaptable
    config: AdaptConfig
    names: list[str]
    graph: Graph = "cut"

    def read(self, inputs: Tensor, targets: Tensor, state: Any) -> Chunk:
        """Score `targets [B, t]` given `inputs [B, t]`, then learn from them."""

        def read_with(weights: Weights) -> tuple[Tensor, Tensor, Any]:
            logits, after = self.model(inputs, state.replace(weights))
            return token_losses(logits, targets), logits, after

        with torch.set_grad_enabled(self.graph != "cut" or bool(self.names)):
            tensors = state.named_tensors()
            weights = {name: self._open(tensors[name]) for name in self.names}
            losses, logits, after = read_with(weights)
            amount = surprise(self.config.surprise, logits.detach(), targets, losses.detach())
            wrote = (amount >= self.config.threshold) & (targets != IGNORE).any(1) & bool(self.names)
            change = self._change(
                weights, row_means(losses, targets), wrote, lambda now: row_means(read_with(now)[0], targets)
            )
            if self.names and self.graph == "cut":
                losses, after = losses.detach(), after.detach()
            tensors = after.named_tensors()
            after = after.replace({name: tensors[name] + change[name] for name in self.names})
        return Chunk(losses, amount, wrote, after)

    def _change(
        self, weights: Weights, means: Tensor, wrote: Tensor, means_with: Callable[[Weights], Tensor]
    ) -> Weights:
        """What `steps` gradient steps change; `means [B]` are the losses of rows with `weights`."""
        total: Weights = {}
        for step in range(self.config.steps if weights else 0):
            now = {name: self._open(weights[name] + total[name]) for name in weights} if step else weights
            objective = (means_with(now) if step else means).sum()
            with torch.autocast(objective.device.type, enabled=False):  # backward passes keep their precision
                gradients = torch.autograd.grad(
                    objective,
                    list(now.values()),
                    retain_graph=self.graph != "cut",
                    create_graph=self.graph == "through",
                    materialize_grads=True,
                )
            for name, gradient in zip(now, gradients, strict=True):
                move = -self.config.lr * torch.where(_like(wrote, gradient), gradient, 0)
                total[name] = total[name] + move if step else move
        return total

    def _open(self, weight: Tensor) -> Tensor:
        """A tensor to take the gradient at."""
        keep = self.graph != "cut" and weight.requires_grad
        return weight if keep else weight.detach().requires_grad_()


def _like(rows: Tensor, tensor: Tensor) -> Tensor:
    """`rows [B]` shaped to be broadcast over `tensor [B, …]`."""
    return rows.view(-1, *[1] * (tensor.dim() - 1))


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """−log p of every target in nats, `[B, t]`, in float32 at least; 0 for targets that are padding."""
    wide = logits.float() if logits.dtype.itemsize < 4 else logits
    losses = F.cross_entropy(wide.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="none")
    return losses.view(targets.shape)


def row_means(values: Tensor, targets: Tensor) -> Tensor:
    """Mean of `values [B, t]` over the targets of every row that are not padding; 0 without any."""
    counted = targets != IGNORE
    return torch.where(counted, values, 0).sum(1) / counted.sum(1).clamp(min=1)


def surprise(kind: str, logits: Tensor, targets: Tensor, losses: Tensor) -> Tensor:
    """How much a chunk surprised every row, `[B]`; zeros for "none".

    "l2": root mean square over tokens of ‖softmax(logits) − onehot(target)‖, the gradient of a token's loss
    at its logits: 0 if all was known, √2 if all was wrong and certain. "loss": mean loss in nats.
    "logit_entropy": mean entropy of the predictions in nats.
    """
    if kind == "none":
        return torch.zeros_like(losses[:, 0])
    if kind == "loss":
        return row_means(losses, targets)
    log_p = torch.log_softmax(logits.to(losses.dtype), -1)
    p = log_p.exp()
    if kind == "logit_entropy":
        return row_means(-(p * log_p).sum(-1), targets)
    error = p.square().sum(-1) - 2 * torch.exp(-losses) + 1
    return row_means(error, targets).clamp(min=0).sqrt()
