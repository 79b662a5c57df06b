"""Inverses of unit lower triangular matrices in one Triton kernel, one program per matrix.

By halves, as `inverse.py: by_halves`, which takes several kernels for every size of blocks. Only the inverse
needs a kernel: its derivative is three products.

Shapes: `M` matrices of size `C`, a power of two.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from nested_learning.ops import kernels
from nested_learning.ops.kernels import Kernel, precision
from nested_learning.ops.tiles import invert_unit_lower

WARPS = 4


def invert(strict: Tensor) -> Tensor:
    """(I + N)⁻¹ for `N [M, C, C]` in float32, zero from the diagonal upwards."""
    strict = strict.contiguous()
    inverse = torch.empty_like(strict)
    fixed = constants(strict.shape[-1], precision())
    # Triton starts a kernel on the current device, whatever the device of its tensors.
    with torch.cuda.device_of(strict):  # type: ignore[no-untyped-call]
        invert_matrices[(len(strict),)](strict, inverse, **fixed, num_warps=WARPS, num_stages=1)
    return inverse


def constants(size: int, products: str) -> dict[str, Any]:
    """The constants of `invert_matrices` for matrices of `size`."""
    return {"C": size, "LOG": size.bit_length() - 1, "P": products}


@triton.jit
def invert_matrices(strict, inverse, C: tl.constexpr, LOG: tl.constexpr, P: tl.constexpr):
    """The inverse of one matrix by each program."""
    first = tl.program_id(0).to(tl.int64) * (C * C)
    invert_unit_lower(strict + first, inverse + first, 1, C * C, C, LOG, P)


SIZES = (16, 32, 64, 128)
"""Those that `compare` tries, all that `inverse.py` asks for; each has a kernel of its own."""


def compare(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """`difference` by size.

    Args:
        device: where both run.
        dtype: of the numbers in the matrices; the inverse is always in float32.
    """
    return {f"inverse, size {size}": difference(size, device, dtype) for size in SIZES}


def right(size: int, device: torch.device) -> bool:
    """Whether the kernel for matrices of `size` is right there, see `ops/kernels.py: right`."""
    key = ("triangular", size, device)
    return kernels.right(key, precision(), lambda: {"inverse": difference(size, device, torch.float32)})


def difference(size: int, device: torch.device, dtype: torch.dtype) -> float:
    """Largest difference from PyTorch's inverse in float64, relative to the largest entry."""
    strict = sample(size).to(device, dtype)
    wanted = torch.linalg.inv(strict.double() + torch.eye(size, device=device, dtype=torch.float64))
    return float((invert(strict.float()) - wanted).abs().max() / wanted.abs().max())


def sample(size: int) -> Tensor:
    """Matrices `[8, C, C]` of the delta rule: step sizes up to 1, keys that resemble each other."""
    generator = torch.Generator().manual_seed(size)
    keys = F.normalize(torch.randn(8, size, 32, generator=generator) + 0.3, dim=-1)
    eta = torch.rand(8, size, 1, generator=generator)
    return (eta * keys @ keys.mT).tril(-1)


KERNEL = Kernel("triangular", compare)
