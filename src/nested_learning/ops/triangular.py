"""Unit lower triangular systems, batched, in matrix products only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

BASE = 4  # size of the diagonal blocks that are inverted by doubling
# Powers of larger blocks lose digits: with steps up to 2 and nearly equal keys, N has entries near 2. Its
# inverse has none above 2, but its eighth power, in a block of 16, has entries of a million.


def inverse_unit_lower(strict: Tensor) -> Tensor:
    """(I + N)⁻¹ for strictly lower triangular `N [M, C, C]`; the upper part of `N` must be zero.

    By halves, [[A, 0], [B, D]]⁻¹ = [[A⁻¹, 0], [−D⁻¹ B A⁻¹, D⁻¹]], about C³/3 operations, all blocks of a
    size in one product. The smallest blocks are inverted by doubling, (I − X)⁻¹ = (I + X)(I + X²)(I + X⁴)…
    """
    batch, size, _ = strict.shape
    width = min(BASE, size)
    while width < size:
        width *= 2
    padded = strict if width == size else F.pad(strict, (0, width - size, 0, width - size))
    block = min(BASE, width)
    inverse = _invert_by_doubling(_diagonal_blocks(padded, block), block)
    while block < width:
        below = _diagonal_blocks(padded, 2 * block)[..., block:, :block]
        inverse = _join(inverse, below, block)
        block *= 2
    inverse = inverse.view(batch, width, width)
    return inverse if width == size else inverse[:, :size, :size]


def _diagonal_blocks(matrix: Tensor, block: int) -> Tensor:
    """The diagonal blocks of `[M, C, C]` as a view `[M, C / block, block, block]`."""
    batch, size, _ = matrix.shape
    blocks = matrix.view(batch, size // block, block, size // block, block)
    return blocks.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)


def _invert_by_doubling(blocks: Tensor, block: int) -> Tensor:
    power = -blocks.reshape(-1, block, block)
    inverse = power + torch.eye(block, dtype=power.dtype, device=power.device)
    reached = 2
    while reached < block:
        power = torch.bmm(power, power)
        inverse = torch.baddbmm(inverse, inverse, power)
        reached *= 2
    return inverse


def _join(inverse: Tensor, below: Tensor, block: int) -> Tensor:
    """From the inverses of all blocks `[M·n, c, c]` to those of pairs of blocks `[M·n/2, 2c, 2c]`."""
    pairs = inverse.view(-1, 2, block, block)
    upper, lower = pairs[:, 0], pairs[:, 1]
    corner = torch.bmm(lower, torch.bmm(below.reshape(-1, block, block), upper))
    top = torch.cat([upper, torch.zeros_like(upper)], 2)
    return torch.cat([top, torch.cat([-corner, lower], 2)], 1)


class _Solve(torch.autograd.Function):
    """X = (I + N)⁻¹ R with dR = (I + N)⁻ᵀ dX and dN = −dR Xᵀ: the inverse itself is never differentiated."""

    @staticmethod
    def forward(ctx: Any, strict: Tensor, rhs: Tensor) -> Tensor:
        inverse = inverse_unit_lower(strict)
        solution = torch.bmm(inverse, rhs)
        ctx.save_for_backward(strict, inverse, solution)
        return solution

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        strict, inverse, solution = ctx.saved_tensors
        if torch.is_grad_enabled():  # to be differentiated again: the inverse as a function of N
            flipped = _Solve.apply(strict.mT.flip(1, 2), grad.flip(1))  # type: ignore[no-untyped-call]
            grad_rhs = flipped.flip(1)
        else:
            grad_rhs = torch.bmm(inverse.mT, grad)
        return -torch.bmm(grad_rhs, solution.mT).tril(-1), grad_rhs


def solve_unit_lower(strict: Tensor, rhs: Tensor) -> Tensor:
    """Solve (I + N) X = R for strictly lower triangular `N [..., C, C]` and `R [..., C, n]`.

    Differentiable in both arguments, also twice. The upper part of `N` must be zero.
    """
    size, width = rhs.shape[-2:]
    if size == 1:
        return rhs
    flat = strict.reshape(-1, size, size), rhs.reshape(-1, size, width)
    solution: Tensor = _Solve.apply(*flat)  # type: ignore[no-untyped-call]
    return solution.view(rhs.shape)
