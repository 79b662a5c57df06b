"""Measures of matrices, and of the write of a memory.

Shapes: H heads of one sequence, n tokens, `o × i` a matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nested_learning.ops.delta_rule.chunk import Written
from nested_learning.ops.memory_mlp.chunk import StackWritten


class RankOne(NamedTuple):
    """What every token adds to a matrix: `left [H, n, o]` times `keys [H, n, i]`, one outer product each."""

    left: Tensor
    keys: Tensor

    def total(self) -> Tensor:
        """The sum over the tokens, `[H, o, i]`."""
        return self.left.mT @ self.keys

    def squares(self) -> Tensor:
        """Squared Frobenius norms of the outer products `[H, n]`."""
        return self.left.square().sum(-1) * self.keys.square().sum(-1)


def effective_rank(matrix: Tensor) -> Tensor:
    """exp(−Σ p log p) of `matrix [..., o, i]`, with p its singular values over their sum; 0 for zeros.

    It is r for a matrix with r equal singular values, and less the more unequal they are.
    """
    values = torch.linalg.svdvals(matrix.double())
    total = values.sum(-1, keepdim=True)
    share = values / total.clamp(min=torch.finfo(values.dtype).tiny)
    return torch.where(total[..., 0] > 0, torch.special.entr(share).sum(-1).exp(), 0.0)


def joint_norm(matrices: Sequence[Tensor]) -> Tensor:
    """Frobenius norm of several matrices `[H, o, i]` taken together, `[H]`."""
    return torch.stack([m.double().square().sum((-2, -1)) for m in matrices]).sum(0).sqrt()


def outer_products(written: Written) -> RankOne:
    """−(a ∘ U + c ∘ Ê) and the keys of a write: what its tokens have added to W at the end of the chunk."""
    rates = written.rates
    decay = rates.a if rates.c is None else rates.c
    parts = [(rates.a, written.solved), (decay, written.error)]
    left = sum(d.end[..., None] * part for d, part in parts if part is not None)
    assert isinstance(left, Tensor)
    return RankOne(-left, written.keys)


def stack_products(written: StackWritten) -> list[dict[str, RankOne]]:
    """The same of every memory of a stack, for its matrices W2 and W1."""
    second: list[RankOne] = []
    for group in written.second:
        left, keys = outer_products(group)
        second += [RankOne(left[:, m], keys[:, m]) for m in range(keys.shape[1])]
    left, keys = outer_products(written.first)
    first = left.view(*left.shape[:2], len(second), -1)
    return [{"W2": RankOne(first[:, :, m], keys), "W1": second[m]} for m in range(len(second))]
