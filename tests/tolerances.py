"""How far two computations of the same numbers may be apart: from what was computed, not from one processor.

Kernels of matrix products differ from processor to processor, with the number of threads and with the shapes
(a row alone, in a batch, with padding): they add the same terms in another order. A sum of n terms then
differs by at most n · eps · Σ|terms|. That is relative to the size of the whole tensor, not to that of the
entry: an entry that is small because large terms cancel has the rounding error of the large terms.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

SAFETY = 1000.0


def tolerance(length: int, dtype: torch.dtype = torch.float64, factor: float = SAFETY) -> float:
    """factor · length · eps: the error allowed, relative to the largest entry of what is compared.

    Args:
        length: Operations in a row that feed one number: inner width of the products times the tokens that a
            memory passes, or times the update steps of an optimizer. The order of magnitude is what matters.
        dtype: Of the computation, not of the result: a loss in a Python float may come from float32.
        factor: How much the computation may magnify a rounding error, times the safety. Memories that write
            with large steps and never forget magnify 16 times (measured: the error in float32 over
            length · eps), all others less than once. 1000 is 60 times the worst of them, and in float64, at
            2e-13 · length, still far below the effect of any real fault. Comparisons in float32 need a
            smaller one.
    """
    return factor * length * torch.finfo(dtype).eps


def assert_same(
    actual: Any, expected: Any, length: int, factor: float = SAFETY, scale: float | None = None
) -> None:
    """Assert that tensors, or sequences and mappings of them, are equal but for rounding.

    Shapes, types and nesting must be the same. Every tensor is measured by its own largest entry.

    Args:
        actual: What was computed; nothing in it may be NaN.
        expected: What it should be.
        length: Operations in a row; see `tolerance`.
        factor: Magnification of rounding errors and safety; see `tolerance`.
        scale: Size of the terms, where they are larger than the result, as in a gradient that should be 0.
            None: the largest entry of `expected`, tensor by tensor.

    Raises:
        AssertionError: Some entry is further away than `tolerance` times the scale.
    """
    if not isinstance(expected, Tensor):
        for one, other in nested_pairs(actual, expected):
            assert_same(one, other, length, factor, scale)
        return
    if scale is None:
        scale = float(expected.detach().abs().max()) if expected.numel() else 0.0
    bound = tolerance(length, expected.dtype, factor) * scale
    torch.testing.assert_close(actual, expected, rtol=0, atol=bound)


def nested_pairs(actual: Any, expected: Any) -> Iterable[tuple[Any, Any]]:
    """Entries of two mappings with the same names, or of two sequences of the same length."""
    if isinstance(expected, Mapping):
        assert isinstance(actual, Mapping) and actual.keys() == expected.keys(), "different names"
        return [(actual[name], expected[name]) for name in expected]
    return zip(actual, expected, strict=True)
