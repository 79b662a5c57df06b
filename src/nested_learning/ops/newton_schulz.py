"""Newton–Schulz iteration: the nearest matrix with orthonormal rows or columns, in matrix products only.

Shapes: m rows, n columns, any leading batch dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

QUINTIC = (3.4445, -4.7750, 2.0315)
"""Muon's coefficients: steep at zero; singular values end between 0.7 and 1.2 rather than at 1."""
CUBIC = (1.5, -0.5, 0.0)
"""X ← 1.5 X − 0.5 X Xᵀ X (Eq. 44 with ζ = ¼ at O = g): ends at 1, slowly from small singular values."""
POLYNOMIALS = {"quintic": QUINTIC, "cubic": CUBIC}
EPS = 1e-7


def newton_schulz(
    matrices: Tensor, steps: int = 5, polynomial: str = "quintic", dtype: torch.dtype | None = None
) -> Tensor:
    """U Vᵀ of `matrices [..., m, n]` = U S Vᵀ, approximately; a matrix of zeros stays zero.

    Each is divided by its Frobenius norm, then X ← aX + (bA + cA²)X with A = X Xᵀ, on the smaller side.

    Args:
        steps: iterations T.
        polynomial: "quintic" or "cubic".
        dtype: of the products and of the result; None = that of `matrices`.

    Raises:
        ValueError: an unknown polynomial, fewer than one step, or a tensor that is no matrix.
    """
    if polynomial not in POLYNOMIALS:
        raise ValueError(f"polynomial must be one of {', '.join(POLYNOMIALS)}, got {polynomial!r}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if matrices.ndim < 2:
        raise ValueError(f"newton_schulz needs matrices [..., m, n], got shape {tuple(matrices.shape)}")
    rows, columns = matrices.shape[-2:]
    x = matrices.reshape(-1, rows, columns).to(dtype or matrices.dtype)
    x = x.mT if rows > columns else x
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=EPS)
    for _ in range(steps):
        x = _iterate(x, *POLYNOMIALS[polynomial])
    return (x.mT if rows > columns else x).view(matrices.shape)


def _iterate(x: Tensor, a: float, b: float, c: float) -> Tensor:
    """One step on `x [N, m, n]`; three batched products, two without a fifth power."""
    gram = torch.bmm(x, x.mT)
    if c:
        return torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return torch.baddbmm(x, gram, x, beta=a, alpha=b)


def newton_schulz_all(
    matrices: Sequence[Tensor], steps: int = 5, polynomial: str = "quintic", dtype: torch.dtype | None = None
) -> list[Tensor]:
    """`newton_schulz` of every `[m, n]`; those of one shape, or of its transpose, share their products."""
    shapes: dict[tuple[int, int], list[int]] = {}
    for i, matrix in enumerate(matrices):
        shapes.setdefault((min(matrix.shape), max(matrix.shape)), []).append(i)
    results: dict[int, Tensor] = {}
    for indices in shapes.values():
        wide = [matrices[i].mT if _is_tall(matrices[i]) else matrices[i] for i in indices]
        for i, result in zip(
            indices, newton_schulz(torch.stack(wide), steps, polynomial, dtype), strict=True
        ):
            results[i] = result.mT if _is_tall(matrices[i]) else result
    return [results[i] for i in range(len(matrices))]


def _is_tall(matrix: Tensor) -> bool:
    return matrix.shape[0] > matrix.shape[1]
