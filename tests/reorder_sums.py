"""Products summed in another order: what a processor with other kernels does, on the machine at hand.

`pytest --reorder-sums 0` replaces the CPU kernels of mm, addmm, bmm and baddbmm, of float32 and float64, by ones that
cut the inner dimension in two and add the products of both parts. Where the cut lies depends on the number (0, 1, ...:
as many other processors) and on the rows: real kernels too sum a row in another order when it stands in another
batch, which is what a comparison of a stream with a whole sequence meets. Every result is as exact as before; a test
that fails has too tight a tolerance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64)  # halves of a lower precision would be rounded before they are added


def product(kernel: Callable[..., Tensor], seed: int, a: Tensor, b: Tensor) -> Tensor:
    """a @ b by the out= variant of a kernel, which stays torch's own, over the inner dimension in two parts."""
    inner, rows = a.shape[-1], a.shape[-2]

    def part(x: Tensor, y: Tensor) -> Tensor:
        return kernel(x, y, out=x.new_empty(*x.shape[:-1], y.shape[-1]))

    if inner < 2 or a.dtype not in DTYPES:
        return part(a, b)
    cut = 1 + (inner // 2 + seed + 7 * rows) % (inner - 1)
    return part(a[..., cut:], b[..., cut:, :]) + part(a[..., :cut], b[..., :cut, :])


def plus_bias(kernel: Callable[..., Tensor], seed: int) -> Callable[..., Tensor]:
    def call(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
        out = alpha * product(kernel, seed, a, b)
        return out.add(bias, alpha=beta) if beta else out

    return call


@contextmanager
def reorder_sums(seed: int) -> Iterator[torch.library.Library]:
    """Replace the kernels of the whole process, in every thread and in backward passes, until the end."""
    library = torch.library.Library("aten", "IMPL")
    for kernel in (torch.mm, torch.bmm):
        library.impl(kernel.__name__, lambda a, b, k=kernel: product(k, seed, a, b), "CPU", allow_override=True)
    library.impl("addmm", plus_bias(torch.mm, seed), "CPU", allow_override=True)
    library.impl("baddbmm", plus_bias(torch.bmm, seed), "CPU", allow_override=True)
    try:
        yield library
    finally:
        library._destroy()
