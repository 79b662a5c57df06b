"""Measures against numbers that are known."""

from __future__ import annotations

import math

import pytest
import torch

from nested_learning.inspection.measures import effective_rank


def rotated(values: list[float]) -> torch.Tensor:
    """A 5 × 4 matrix with these singular values."""
    torch.manual_seed(0)
    left, _ = torch.linalg.qr(torch.randn(5, 4, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))
    return left @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ right


@pytest.mark.parametrize(
    "values, rank",
    [
        ([3.0, 3.0, 3.0, 3.0], 4.0),
        ([7.0, 7.0, 0.0, 0.0], 2.0),
        ([5.0, 0.0, 0.0, 0.0], 1.0),
        ([2.0, 1.0, 1.0, 0.0], 2 * math.sqrt(2)),  # shares ½, ¼, ¼: 2^½ · 4^¼ · 4^¼
    ],
)
def test_effective_rank_of_known_singular_values(values: list[float], rank: float) -> None:
    assert float(effective_rank(rotated(values))) == pytest.approx(rank, rel=1e-9)
    assert float(effective_rank(1e-6 * rotated(values))) == pytest.approx(rank, rel=1e-9)


def test_an_empty_memory_has_rank_0_and_heads_stay_apart() -> None:
    found = effective_rank(torch.stack([torch.zeros(3, 3), torch.eye(3)]))
    assert found.tolist() == pytest.approx([0.0, 3.0])
