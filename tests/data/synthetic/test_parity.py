"""Running parity against a Python loop."""

import pytest
import torch

from nested_learning.data.synthetic import parity_batch


def test_targets_flip_at_every_one():
    bits, targets = parity_batch(8, 33, torch.Generator().manual_seed(0))
    assert bits.dtype == targets.dtype == torch.int64
    for row, target in zip(bits.tolist(), targets.tolist(), strict=True):
        parity, expected = 0, []
        for bit in row:
            parity ^= bit
            expected.append(parity)
        assert target == expected


def test_bits_are_fair_and_reproducible():
    first, again = (parity_batch(100, 100, torch.Generator().manual_seed(1))[0] for _ in range(2))
    assert torch.equal(first, again)
    assert set(first.unique().tolist()) == {0, 1} and abs(first.sum().item() - 5000) < 250


def test_empty_length_is_refused():
    with pytest.raises(ValueError, match="length=0 must be at least 1"):
        parity_batch(2, 0)
