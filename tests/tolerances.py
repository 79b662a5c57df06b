"""How far two computations of the same numbers may be apart, from what was computed instead of from one processor.

Kernels of matrix products differ from processor to processor, with the number of threads and with the shapes (a row
alone, in a batch, with padding): they add the same terms in another order. A sum of n terms then differs by at most
n · eps · Σ|terms|, and that is relative to the size of the *tensor*, not to that of the entry: an entry that is
small because large terms cancel has the rounding error of the large terms.
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
        length: Operations in a row that feed one number: inner width of the products times the tokens that a memory
            passes, or times the update steps of an optimizer. The order of magnitude is what matters.
        dtype: Of the computation, not of the result: a loss in a Python float may come from float32.
        factor: How much the computation may magnify a rounding error, and the safety. Memories that write with large
            steps and never forget magnify by 16 (measured as the error in float32 over length · eps), all others by
            less than 1. 1000 leaves room for 60 times the worst of them, and in float64 is still far below the effect
            of any real fault: 2e-13 · length. Comparisons in float32 need a smaller one.
    """
    return factor * length * torch.finfo(dtype).eps


def assert_same(
    actual: Any, expected: Any, length: int, factor: float = SAFETY, scale: float | None = None
) -> None:
    """Assert that tensors, or sequences and mappings of them, are equal but for rounding.

    Shapes, types and nesting must be the same. Every tensor of a nesting is measured by its own largest entry.

    Args:
        actual: What was computed; nothing in it may be NaN.
        expected: What it should be.
        length: Operations in a row; see `tolerance`.
        factor: Magnification of rounding errors and safety; see `tolerance`.
        scale: Size of the terms, where it is larger than the result: they cancel, as in a gradient that should be 0.
            None: the largest entry of `expected`, tensor by tensor.

    Raises:
        AssertionError: Some entry is further away than `tolerance` times the scale.
    """
    if not isinstance(expected, Tensor):
        pairs = list(nested_pairs(actual, expected))
        for one, other in pairs:
            assert_same(one, other, length, factor, scale)
        return
    assert isinstance(actual, Tensor), f"expected a tensor, got {type(actual).__name__}"
    if not expected.numel():
        size = 0.0
    elif scale is None:
        size = float(expected.detach().abs().max())
    else:
        size = scale
    bound = tolerance(length, expected.dtype, factor) * size
    torch.testing.assert_close(actual, expected, rtol=0, atol=bound)


def nested_pairs(actual: Any, expected: Any) -> Iterable[tuple[Any, Any]]:
    if isinstance(expected, Mapping):
        assert isinstance(actual, Mapping) and actual.keys() == expected.keys(), "different names"
        return [(actual[name], expected[name]) for name in expected]
    return zip(actual, expected, strict=True)
