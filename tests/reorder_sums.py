"""Products summed in another order: what a processor with other kernels does, on the machine at hand.

`pytest --reorder-sums 0` replaces the CPU kernels of mm, addmm, bmm and baddbmm, of float32 and float64, by
ones that cut the inner dimension in two and add the products of both parts. Where the cut lies depends on the
given number (as many other processors) and on the number of rows: real kernels too sum a row in another order
when it stands in another batch, which is what a comparison of a stream with a whole sequence meets. Every
result is as exact as before; a test that fails has too tight a tolerance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64)  # parts in a lower precision would be rounded before they are added
Kernel = Callable[..., Tensor]


def empty_product(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(*a.shape[:-1], b.shape[-1])


def product_of(kernel: Kernel, order: int) -> Kernel:
    """a @ b by the out= variants of `kernel`, which stay torch's own."""

    def call(a: Tensor, b: Tensor) -> Tensor:
        inner, rows = a.shape[-1], a.shape[-2]
        if inner < 2 or a.dtype not in DTYPES:
            return kernel(a, b, out=empty_product(a, b))
        cut = 1 + (inner // 2 + order + 7 * rows) % (inner - 1)
        parts = ((a[..., cut:], b[..., cut:, :]), (a[..., :cut], b[..., :cut, :]))
        last, first = (kernel(x, y, out=empty_product(x, y)) for x, y in parts)
        return last + first

    return call


def with_bias(plain: Kernel, product: Kernel) -> Kernel:
    """β bias + α a @ b; the bias is not read at β = 0, as it may hold anything."""

    def call(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
        if a.dtype not in DTYPES:
            return plain(bias, a, b, beta=beta, alpha=alpha, out=empty_product(a, b))
        out = alpha * product(a, b)
        return out.add(bias, alpha=beta) if beta else out

    return call


@contextmanager
def reorder_sums(order: int) -> Iterator[None]:
    """Replace the kernels of the whole process, in every thread and in backward passes, until the end."""
    library = torch.library.Library("aten", "IMPL")
    for plain, biased in ((torch.mm, torch.addmm), (torch.bmm, torch.baddbmm)):
        product = product_of(plain, order)
        library.impl(plain.__name__, product, "CPU", allow_override=True)
        library.impl(biased.__name__, with_bias(biased, product), "CPU", allow_override=True)
    try:
        yield
    finally:
        library._destroy()
