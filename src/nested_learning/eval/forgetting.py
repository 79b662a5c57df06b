"""What a model lost of earlier tasks while it learned later ones, from a matrix of scores.

`scores[i][j]` is the score on task j after task i was learned, and higher is better: of losses, give the
negatives. T tasks, counted from 0.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

Matrix = Sequence[Sequence[float]]


def backward_transfer(scores: Matrix) -> float:
    """Mean over tasks j < T−1 of R[T−1][j] − R[j][j] (Lopez-Paz & Ranzato, arXiv 1706.08840).

    Negative: later tasks cost earlier ones. Raises ValueError unless `scores` is square, with T > 1.
    """
    last = _check(scores)
    return statistics.fmean(scores[last][j] - scores[j][j] for j in range(last))


def forgetting(scores: Matrix) -> float:
    """Mean over tasks j < T−1 of max over i < T−1 of R[i][j], minus R[T−1][j] (Chaudhry et al., arXiv
    1801.10112): what was lost of the best there ever was.

    Raises ValueError as `backward_transfer`.
    """
    last = _check(scores)
    return statistics.fmean(max(scores[i][j] for i in range(last)) - scores[last][j] for j in range(last))


def final_average(scores: Matrix) -> float:
    """Mean score over all tasks at the end."""
    return statistics.fmean(scores[-1])


def learned(scores: Matrix) -> float:
    """Mean score of every task right after it was learned: how well new things are learned."""
    _check(scores)
    return statistics.fmean(scores[i][i] for i in range(len(scores)))


def negated(losses: Matrix) -> list[list[float]]:
    """Losses as scores."""
    return [[-loss for loss in row] for row in losses]


def _check(scores: Matrix) -> int:
    """Number of the last task."""
    if len(scores) < 2 or any(len(row) != len(scores) for row in scores):
        shape = [len(row) for row in scores]
        raise ValueError(f"scores must be a square matrix of at least two tasks, got rows of {shape}")
    return len(scores) - 1
