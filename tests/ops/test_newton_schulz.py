"""Newton–Schulz against NumPy, against the singular value decomposition, alone and in batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tolerances import SAFETY, assert_same

from nested_learning.ops.newton_schulz import newton_schulz, newton_schulz_all

SHAPES = [(5, 3), (3, 5), (4, 4), (1, 6), (3, 5)]


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def by_hand(g: np.ndarray, steps: int, a: float, b: float, c: float) -> np.ndarray:
    x = g / np.linalg.norm(g)
    for _ in range(steps):
        x = a * x + b * x @ x.T @ x + c * x @ x.T @ x @ x.T @ x
    return x


@pytest.mark.parametrize(
    "polynomial, abc", [("quintic", (3.4445, -4.775, 2.0315)), ("cubic", (1.5, -0.5, 0))]
)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_polynomial_by_hand(polynomial, abc, shape):
    g = random(*shape)
    expected = torch.from_numpy(by_hand(g.numpy(), 5, *abc))
    assert_same(newton_schulz(g, 5, polynomial), expected, length=5 * 6)


def test_cubic_ends_at_the_nearest_orthogonal_matrix():
    for shape in SHAPES:
        g = random(*shape)
        u, _, vh = torch.linalg.svd(g, full_matrices=False)
        torch.testing.assert_close(newton_schulz(g, 60, "cubic"), u @ vh, rtol=0, atol=1e-9)


def test_quintic_brings_singular_values_near_one_in_five_steps():
    g = random(40, 64)
    values = torch.linalg.svdvals(newton_schulz(g, 5))
    assert values.min() > 0.65 and values.max() < 1.25
    before = torch.linalg.svdvals(g / g.norm())
    assert before.min() < 0.1 and before.max() < 0.5  # it had something to do


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_matrices_of_one_shape_share_products_and_keep_their_places(dtype):
    matrices = [random(*shape) for shape in SHAPES]
    together = newton_schulz_all(matrices, 4, "quintic", dtype)
    for matrix, result in zip(matrices, together, strict=True):
        alone = newton_schulz(matrix, 4, "quintic", dtype)
        assert result.dtype == (dtype or torch.float64)
        assert_same(result, alone, length=4 * 6, factor=20 if dtype else SAFETY)
    batch = torch.stack([matrices[1], matrices[4]]).view(2, 1, 3, 5)
    assert_same(newton_schulz(batch)[1, 0], newton_schulz(matrices[4]), length=5 * 6)


def test_zero_stays_zero_and_scale_does_not_matter():
    assert newton_schulz(torch.zeros(3, 4)).count_nonzero() == 0
    g = random(3, 4)
    assert_same(newton_schulz(1e4 * g), newton_schulz(g), length=5 * 4)
    assert_same(newton_schulz(-g), -newton_schulz(g), length=5 * 4)


def test_errors():
    with pytest.raises(ValueError, match="polynomial must be one of quintic, cubic, got 'septic'"):
        newton_schulz(torch.ones(2, 2), polynomial="septic")
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        newton_schulz(torch.ones(2, 2), steps=0)
    with pytest.raises(ValueError, match=r"got shape \(3,\)"):
        newton_schulz(torch.ones(3))
