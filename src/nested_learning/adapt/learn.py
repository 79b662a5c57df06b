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

from nested_learning.adapt.paths import Adaptable
from nested_learning.config import AdaptConfig
from nested_learning.train.objective import IGNORE

Graph = Literal["cut", "first_order", "through"]
Weights = dict[str, Tensor]


class Chunk(NamedTuple):
    """What came of a chunk.

    losses: `[B, t]` nats, from before learning from it; 0 for ignored targets. surprise: `[B]`. wrote: `[B]`,
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
        with torch.set_grad_enabled(self.graph != "cut" or bool(self.names)):
            tensors = state.named_tensors()
            weights = {name: self._open(tensors[name]) for name in self.names}
            logits, after = self.model(inputs, state.replace(weights))
            losses = token_losses(logits, targets)
            amount = surprise(self.config.surprise, logits.detach(), targets, losses.detach())
            wrote = (amount >= self.config.threshold) & bool(self.names)
            if self.names:

                def objective(moved: Weights | None) -> Tensor:
                    now = losses if moved is None else self._losses(inputs, targets, state.replace(moved))
                    return row_means(now, targets).sum()

                change = self._change(weights, objective, wrote)
                losses, after = (losses, after) if self.graph != "cut" else (losses.detach(), after.detach())
                tensors = after.named_tensors()
                after = after.replace({name: tensors[name] + change[name] for name in self.names})
        return Chunk(losses, amount, wrote, after)

    def _losses(self, inputs: Tensor, targets: Tensor, state: Any) -> Tensor:
        return token_losses(self.model(inputs, state)[0], targets)

    def _change(
        self, weights: Weights, objective: Callable[[Weights | None], Tensor], wrote: Tensor
    ) -> Weights:
        """What `steps` gradient steps from `weights` change; `objective(None)` is that of `weights`."""
        now, total = weights, dict.fromkeys(weights, torch.zeros((), device=wrote.device))
        for step in range(self.config.steps):
            gradients = torch.autograd.grad(
                objective(now if step else None),
                list(now.values()),
                retain_graph=self.graph != "cut",
                create_graph=self.graph == "through",
                materialize_grads=True,
            )
            moves = {
                name: -self.config.lr * torch.where(_like(wrote, gradient), gradient, 0)
                for name, gradient in zip(now, gradients, strict=True)
            }
            total = {name: total[name] + moves[name] for name in now}
            now = {name: self._open(now[name] + moves[name]) for name in now}
        return total

    def _open(self, weight: Tensor) -> Tensor:
        """A tensor to take the gradient at."""
        keep = self.graph != "cut" and weight.requires_grad
        return weight if keep else weight.detach().requires_grad_()


def _like(rows: Tensor, tensor: Tensor) -> Tensor:
    """`rows [B]` shaped to be broadcast over `tensor [B, …]`."""
    return rows.view(-1, *[1] * (tensor.dim() - 1))


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """−log p of every target in nats, `[B, t]`, in float32 at least; 0 for ignored ones."""
    wide = logits.float() if logits.dtype.itemsize < 4 else logits
    losses = F.cross_entropy(wide.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="none")
    return losses.view(targets.shape)


def row_means(values: Tensor, targets: Tensor) -> Tensor:
    """Mean of `values [B, t]` over the targets that are not ignored, for every row; 0 without any."""
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
    return row_means(error, targets).sqrt()
