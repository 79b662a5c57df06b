"""Which implementation of a memory's scan runs: PyTorch's, or our Triton kernels."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor

from nested_learning.checks import one_of

CHOICES = ("auto", "torch", "triton")
OLDEST = (8, 0)
"""Compute capability from which on the kernels are made: the first with bf16 and tf32 products."""

MODULES: tuple[str, ...] = (
    "nested_learning.ops.cms.triton",
    "nested_learning.ops.delta_rule.triton",
    "nested_learning.ops.self_modifying.triton",
    "nested_learning.ops.triangular.triton",
)
"""Modules with Triton kernels; each has a `KERNEL`, which checks it."""

_choice = "auto"


@dataclass(frozen=True)
class Kernel:
    """A Triton kernel with its check.

    Args:
        name: such as "delta_rule".
        compare: largest relative difference from the token loop of `naive.py`, for outputs, state and every
            gradient by name, on a device and with inputs of a type.
    """

    name: str
    compare: Callable[[torch.device, torch.dtype], dict[str, float]]


def use_kernels(choice: str) -> None:
    """Choose for this process: "torch", "triton", or "auto": Triton on the cards that can run it."""
    global _choice
    one_of("kernels", choice, CHOICES)
    _choice = choice


@contextmanager
def kernels(choice: str) -> Iterator[None]:
    """Inside, what `use_kernels` would choose; afterwards what was chosen before."""
    before = _choice
    use_kernels(choice)
    try:
        yield
    finally:
        use_kernels(before)


def chosen() -> str:
    """What `use_kernels` was told."""
    return _choice


def use_triton(device: torch.device) -> bool:
    """Whether tensors on `device` go through Triton kernels, where a rule has one.

    Raises:
        RuntimeError: Triton was asked for and cannot work there.
    """
    if _choice == "torch":
        return False
    reason = why_no_triton(device)
    if reason is not None and _choice == "triton":
        raise RuntimeError(f"kernels = triton: {reason}")
    return reason is None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def why_no_triton(device: torch.device) -> str | None:
    """What Triton lacks to run on `device`, or None if it can."""
    if find_spec("triton") is None:
        return "the package triton is not installed"
    if device.type != "cuda":
        return f"Triton has no code for {device.type}"
    if not torch.cuda.is_available():
        return "there is no card"
    if torch.cuda.get_device_capability(device) < OLDEST:
        return f"the card is older than compute capability {OLDEST[0]}.{OLDEST[1]}"
    return None


BOUNDS = {"tf32x3": 1e-3, "tf32": 5e-2, "bf16": 1e-1}
"""Largest relative difference of a kernel from PyTorch in float64 with which it is used, by its products."""
_right: dict[Hashable, bool] = {}


def right(key: Hashable, products: str, differences: Callable[[], dict[str, float]]) -> bool:
    """Whether a kernel gives what PyTorch gives on the card it is to run on; else PyTorch's path is taken.

    It is tried at its first use, once for every `key` (what it is compiled for, and the device) and precision
    of `products`, in which `differences` compares it with float64.

    Raises:
        RuntimeError: `kernels = triton`, and it is wrong. Errors of a kernel itself are not caught.
    """
    found: bool = _tried((key, products), BOUNDS[products], differences)
    if not found and _choice == "triton":
        raise RuntimeError(f"kernels = triton: the kernels of {key} are wrong on this card")
    return found


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _tried(key: Hashable, bound: float, differences: Callable[[], dict[str, float]]) -> bool:
    if key not in _right:
        with torch.inference_mode(False), torch.enable_grad():
            found = differences()
        wrong = {name: value for name, value in found.items() if not value <= bound}  # NaN too
        _right[key] = not wrong
        if wrong:
            text = f"wrong Triton kernels are left out, PyTorch is used: {key}: off by {wrong}"
            warnings.warn(text, RuntimeWarning, stacklevel=2)  # runs with Hydra show no lines of loggers
    return _right[key]


def relative(names: Sequence[str], ours: Iterable[Tensor], exact: Iterable[Tensor]) -> dict[str, float]:
    """Largest difference of every result from the exact one, over the largest entry of that."""
    triples = zip(names, ours, exact, strict=True)
    return {name: float((a - b).abs().max() / b.abs().max().clamp(min=1e-9)) for name, a, b in triples}


def products_on(device: torch.device) -> str:
    """Precision of products of matrices that autocast would round: "bf16" inside it, else `precision`."""
    kind = device.type
    if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.bfloat16:
        return "bf16"
    return precision()


def precision() -> str:
    """Precision of the products of float32 matrices in kernels: TF32 where PyTorch's own may use it, else
    three products in TF32, which are as exact as float32."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"
