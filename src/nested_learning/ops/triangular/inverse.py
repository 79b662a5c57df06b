"""Unit lower triangular systems, batched, in matrix products only: PyTorch's, or one kernel's on a card."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from nested_learning.ops.kernels import use_triton

BASE = 4  # size of the diagonal blocks that are inverted by doubling
# Powers of larger blocks lose digits: with steps up to 2 and nearly equal keys, N has entries near 2. Its
# inverse has none above 2, but its eighth power, in a block of 16, has entries of a million.
SIZES = (16, 32, 64, 128)
"""Those of the matrices that the kernel inverts."""


def inverse_unit_lower(strict: Tensor) -> Tensor:
    """(I + N)⁻¹ for strictly lower triangular `N [..., C, C]`; the upper part of `N` must be zero.

    Differentiable any number of times, and only the inverse is stored for it.
    """
    inverse: Tensor = _Inverse.apply(strict)  # type: ignore[no-untyped-call]
    return inverse


class _Inverse(torch.autograd.Function):
    """X = (I + N)⁻¹ with dN = −Xᵀ dX Xᵀ, below the diagonal."""

    @staticmethod
    def forward(ctx: Any, strict: Tensor) -> Tensor:
        size = strict.shape[-1]
        flat = strict.reshape(-1, size, size)
        single = strict.dtype == torch.float32
        by = by_kernel if single and size in SIZES and use_triton(strict.device) else by_halves
        inverse: Tensor = by(flat).view(strict.shape)
        ctx.save_for_backward(inverse)
        return inverse

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (inverse,) = ctx.saved_tensors
        grad_strict: Tensor = -(inverse.mT @ grad @ inverse.mT).tril(-1)
        return grad_strict


@torch.library.custom_op("nested_learning::inverse_unit_lower", mutates_args=())
def by_kernel(strict: Tensor) -> Tensor:
    """The inverses of `N [M, C, C]` on a card, as one operation for `torch.compile`."""
    from nested_learning.ops.triangular import triton  # needs the package triton

    return triton.invert(strict) if triton.right(strict.shape[-1], strict.device) else by_halves(strict)


@by_kernel.register_fake
def _(strict: Tensor) -> Tensor:
    return torch.empty_like(strict, memory_format=torch.contiguous_format)


def by_halves(strict: Tensor) -> Tensor:
    """The inverses of `N [M, C, C]` in PyTorch.

    [[A, 0], [B, D]]⁻¹ = [[A⁻¹, 0], [−D⁻¹ B A⁻¹, D⁻¹]], about C³/3 operations, all blocks of a size in one
    product. The smallest blocks are inverted by doubling, (I − X)⁻¹ = (I + X)(I + X²)(I + X⁴)…
    """
    batch, size, _ = strict.shape
    if size == 1:
        return torch.ones_like(strict)
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
