"""Sampling: supports against a naive sort, frequencies against known probabilities."""

import math

import pytest
import torch
from torch import Tensor

from nested_learning.models.sampling import sample_token, truncate


def naive_support(row: list[float], top_k: int | None, top_p: float | None) -> set[int]:
    """Tokens that may be drawn: sort, cut at k, renormalise, add up until `top_p` is reached."""
    ranked = sorted(range(len(row)), key=lambda i: (-row[i], i))[:top_k]
    weights = [math.exp(row[i]) for i in ranked]
    kept, mass = [], 0.0
    for i, weight in zip(ranked, weights, strict=True):
        kept.append(i)
        mass += weight / sum(weights)
        if top_p is not None and mass >= top_p:
            break
    return set(kept)


@pytest.mark.parametrize("top_k", [None, 1, 3, 11, 50])
@pytest.mark.parametrize("top_p", [None, 1e-9, 0.3, 0.77, 0.95, 1.0])
def test_truncation_keeps_the_support_of_a_naive_sort(top_k: int | None, top_p: float | None) -> None:
    torch.manual_seed(0)
    logits = 2 * torch.randn(20, 11, dtype=torch.float64)
    logits[0] = 0.0  # ties
    kept = truncate(logits, top_k, top_p)
    for row, result in zip(logits, kept, strict=True):
        support = {i for i in range(11) if result[i] > -torch.inf}
        assert support == naive_support(row.tolist(), top_k, top_p)
        assert all(result[i] == row[i] for i in support)


def test_ties_go_to_the_lower_numbers() -> None:
    zeros = torch.zeros(1, 5000)
    assert truncate(zeros, top_k=3).isfinite().nonzero()[:, 1].tolist() == [0, 1, 2]
    assert truncate(zeros[:, :4], top_p=0.5).isfinite().nonzero()[:, 1].tolist() == [0, 1]  # reached exactly


def draw(row: Tensor, count: int, **options: float) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    chosen = sample_token(row.expand(count, -1), generator=generator, **options)  # type: ignore[arg-type]
    return torch.bincount(chosen, minlength=row.shape[0]) / count


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.1, 0.4, 0.2, 0.3]),
        ({"temperature": 0.5}, [1 / 30, 16 / 30, 4 / 30, 9 / 30]),  # squares
        ({"top_k": 2}, [0, 4 / 7, 0, 3 / 7]),
        ({"top_p": 0.75}, [0, 4 / 9, 2 / 9, 3 / 9]),
        ({"top_k": 3, "top_p": 0.75}, [0, 4 / 7, 0, 3 / 7]),  # 7/9 of the three reaches 0.75
    ],
)
def test_frequencies(options: dict[str, float], expected: list[float]) -> None:
    row = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()
    found = draw(row, 100_000, **options)
    torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=0.008)  # five standard errors
    assert torch.equal(found == 0, torch.tensor(expected) == 0)


def test_zero_temperature_and_the_limits_are_greedy() -> None:
    torch.manual_seed(0)
    logits = torch.randn(50, 30)
    best = logits.argmax(dim=-1)
    assert torch.equal(sample_token(logits, temperature=0), best)
    assert torch.equal(sample_token(logits, temperature=1e-42), best)
    assert torch.equal(sample_token(logits, top_k=1), best)
    assert torch.equal(sample_token(logits, top_p=1e-6), best)
    assert torch.equal(sample_token(logits.bfloat16(), temperature=0), logits.bfloat16().argmax(dim=-1))


def test_the_generator_decides_and_the_logits_stay() -> None:
    torch.manual_seed(0)
    logits = torch.randn(64, 30)
    before = logits.clone()
    first, again, other = (
        sample_token(logits, 0.8, 20, 0.9, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(logits, before)


def test_a_token_of_no_probability_is_never_drawn() -> None:
    row = torch.tensor([-torch.inf, 0.0, 0.0])
    assert draw(row, 1000)[0] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature must be at least 0 and finite, got -0.1"),
        ({"temperature": float("nan")}, "temperature must be at least 0 and finite, got nan"),
        ({"top_k": 0}, "top_k must be at least 1 or None, got 0"),
        ({"top_p": 0.0}, "top_p must be in \\(0, 1\\] or None, got 0.0"),
        ({"top_p": 1.5, "temperature": 0}, "top_p must be in \\(0, 1\\] or None, got 1.5"),
    ],
)
def test_errors(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample_token(torch.zeros(1, 3), **options)  # type: ignore[arg-type]


def test_logits_need_two_axes() -> None:
    with pytest.raises(ValueError, match=r"shape \[B, V\], got \[1, 2, 3\]"):
        sample_token(torch.zeros(1, 2, 3))
