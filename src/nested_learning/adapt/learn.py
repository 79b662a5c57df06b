"""One chunk of learning: score it, take gradient steps on its loss, add what they changed to the state.

    L_b = mean of −log p over the targets of row b's chunk
    θ_b ← θ_b − s_b · lr · ∂L_b/∂θ_b        `steps` times, if the chunk surprised row b (Eq. 71)

s_b is 1 where the rate is a sensible one. No rate can do worse than learn nothing from a chunk, because

* a step is cut to a relative change of `STEP`, summed over all weights that learn. The answers of a deep
  network change by no more than a factor of about exp(STEP), however many of its weights take part;
* it must lower L_b by at least the share `PROMISE` of what its gradient promised (the condition of Armijo).
  Otherwise smaller steps are tried, and if none does nothing is learned;
* no weight gets farther from its start than `REACH` times its size there, or than the layer's own writes
  took it (linear memories, which start empty, have no such limit).

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

STEP = 1.0
REACH = 4.0
PROMISE = 0.5
SHARES = (1.0, 1 / 8, 1 / 64)
TINY = torch.finfo(torch.float32).tiny


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
        initial: the state at the start of a context, of one row or of all; it holds at least these weights.
        graph: what stays open to a later gradient: "cut" (nothing), "first_order" (all but the gradients
            that are written) or "through" (all).
    """

    model: Adaptable
    config: AdaptConfig
    names: list[str]
    initial: Any
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
            change, wrote = self._change(
                weights, row_means(losses, targets), wrote, lambda now: row_means(read_with(now)[0], targets)
            )
            if self.names and self.graph == "cut":
                losses, after = losses.detach(), after.detach()
            after = after.replace(self._near_the_start(after.named_tensors(), change))
        return Chunk(losses, amount, wrote, after)

    def _change(
        self, weights: Weights, means: Tensor, wrote: Tensor, means_with: Callable[[Weights], Tensor]
    ) -> tuple[Weights, Tensor]:
        """What `steps` gradient steps change, and the rows `[B]` of which a step was kept.

        `means [B]` are the losses of rows with `weights`, `wrote [B]` the rows that are to learn.
        """
        total: Weights = {}
        kept = torch.zeros_like(wrote)
        for step in range(self.config.steps if weights else 0):
            now = {name: self._open(weights[name] + total[name]) for name in weights} if step else weights
            means = means_with(now) if step else means
            with torch.autocast(means.device.type, enabled=False):  # backward passes keep their precision
                found = torch.autograd.grad(
                    means.sum(),
                    list(now.values()),
                    retain_graph=self.graph != "cut",
                    create_graph=self.graph == "through",
                    materialize_grads=True,
                )
            slopes = dict(zip(now, found, strict=True))
            sizes = relative_sizes(slopes, now)
            rate = STEP / sizes.clamp(min=max(STEP / self.config.lr, TINY))
            rate = rate if self.graph == "through" else rate.detach()
            share = self._share(now, slopes, rate.detach(), means.detach(), means_with)
            learns = wrote & (share > 0)
            for name, slope in slopes.items():
                move = torch.where(_like(learns, slope), -_like(share * rate, slope) * slope, 0)
                total[name] = total[name] + move if step else move
            kept = kept | learns
        return total, kept

    @torch.no_grad()
    def _share(
        self,
        weights: Weights,
        slopes: Weights,
        rate: Tensor,
        means: Tensor,
        means_with: Callable[[Weights], Tensor],
    ) -> Tensor:
        """For every row `[B]` the largest of `SHARES` of a step with `rate [B]` that keeps its promise, or 0.

        `means [B]` are the losses before it.
        """
        promised = rate * torch.stack([row_norms(slope).square() for slope in slopes.values()]).sum(0)
        share = torch.zeros_like(rate)
        for tried in SHARES:
            moved = {n: w - _like(tried * rate, w) * slopes[n] for n, w in weights.items()}
            good = means - means_with(moved) >= PROMISE * tried * promised
            share = torch.where((share == 0) & good, tried, share)
            if self.graph == "cut" and bool((share > 0).all()):  # in training this would wait for the device
                break
        return share

    def _near_the_start(self, tensors: Weights, change: Weights) -> Weights:
        """Weights after a chunk with what was learned from it, projected to the ball around their start."""
        initial = self.initial.named_tensors()
        near = {}
        for name, moved in change.items():
            own = tensors[name] - initial[name]
            size = REACH * row_norms(initial[name])
            radius = torch.where(size > 0, torch.maximum(size, row_norms(own)), torch.inf).detach()
            distance = row_norms(own + moved)
            excess = 1 - torch.where(distance > radius, radius / distance.clamp(min=TINY), 1)
            near[name] = tensors[name] + moved - _like(excess, own) * (own + moved)
        return near

    def _open(self, weight: Tensor) -> Tensor:
        """A tensor to take the gradient at."""
        keep = self.graph != "cut" and weight.requires_grad
        return weight if keep else weight.detach().requires_grad_()


def row_norms(tensor: Tensor) -> Tensor:
    """Norm of every row of `tensor [B, …]`."""
    norms: Tensor = torch.linalg.vector_norm(tensor.flatten(1), dim=1)
    return norms


def relative_sizes(changes: Weights, weights: Weights) -> Tensor:
    """Σ ‖change‖ / ‖weight‖ over all weights, for every row `[B]`. One that is zero is not counted."""
    sizes = {name: row_norms(weights[name]) for name in changes}
    parts = [
        torch.where(sizes[name] > 0, row_norms(change) / sizes[name].clamp(min=TINY), 0)
        for name, change in changes.items()
    ]
    return torch.stack(parts).sum(0)


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
