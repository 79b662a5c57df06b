"""What a model forgot of earlier tasks while it learned later ones, from a matrix of scores.

`scores[i][j]` is the score on task j after task i was learned. Higher is better, so losses are given with the
opposite sign. There are T tasks, counted from 0.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

Matrix = Sequence[Sequence[float]]


def backward_transfer(scores: Matrix) -> float:
    """Mean over tasks j < T−1 of R[T−1][j] − R[j][j] (Lopez-Paz & Ranzato, arXiv 1706.08840).

    It is negative if learning later tasks made earlier ones worse.

    Raises:
        ValueError: `scores` is not square, or T < 2.
    """
    last = _check(scores)
    return statistics.fmean(scores[last][j] - scores[j][j] for j in range(last))


def forgetting(scores: Matrix) -> float:
    """Mean over tasks j < T−1 of max over i < T−1 of R[i][j], minus R[T−1][j] (Chaudhry et al., arXiv
    1801.10112): the loss against the best score there ever was.

    Raises:
        ValueError: `scores` is not square, or T < 2.
    """
    last = _check(scores)
    return statistics.fmean(max(scores[i][j] for i in range(last)) - scores[last][j] for j in range(last))


def final_average(scores: Matrix) -> float:
    """Mean score over all tasks after the last one."""
    return statistics.fmean(scores[-1])


def learned(scores: Matrix) -> float:
    """Mean over tasks of the score right after the task was learned."""
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
