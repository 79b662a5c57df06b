"""The training objective: cross-entropy of the next token."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from nested_learning.data.padding import IGNORE


def next_token_loss(logits: Tensor, targets: Tensor, count: int | Tensor | None = None) -> Tensor:
    """Cross-entropy in nats, summed over the targets and divided by their number.

    Args:
        logits: `[B, T, V]`, any floating type; the softmax is computed in float32 or better.
        targets: `[B, T]` int64; `-100` is not counted.
        count: the divisor. Give the number of targets of the whole step when `logits` are only a
            part of it (gradient accumulation, several ranks), as a number or as a scalar integer on the
            device; None = targets counted here.

    Returns:
        A scalar. With no target at all it is 0, not NaN.
    """
    if logits.dtype.itemsize < 4:
        logits = logits.float()
    total = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=IGNORE, reduction="sum")
    if isinstance(count, int):
        return total / max(1, count)
    return total / (count_targets(targets) if count is None else count).clamp(min=1)


def count_targets(targets: Tensor) -> Tensor:
    """Number of targets that are not ignored, a scalar int64."""
    return (targets != IGNORE).sum()
