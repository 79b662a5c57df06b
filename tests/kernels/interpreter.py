"""Our Triton kernels in Triton's interpreter, which runs them on the CPU."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np
import triton.experimental.gluon.language  # noqa: F401  the interpreter imports it when the language is exchanged
import triton.language as tl
from triton import knobs
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle
from triton.runtime.jit import JITFunction

KERNELS = (
    "nested_learning.ops.tiles",
    "nested_learning.ops.delta_rule.triton",
    "nested_learning.ops.self_modifying.forward",
    "nested_learning.ops.self_modifying.backward",
    "nested_learning.ops.self_modifying.triton",
    "nested_learning.ops.triangular.triton",
    "nested_learning.ops.cms.forward",
    "nested_learning.ops.cms.backward",
    "nested_learning.ops.cms.triton",
)
"""Modules with kernels. `triton.jit` decides at their import whether the kernels are interpreted."""


def interpreted(name: str) -> ModuleType:
    """A second copy of the module `name`, and of those with kernels that it imports, for the interpreter."""
    before = {other: sys.modules.pop(other, None) for other in KERNELS}
    was, knobs.runtime.interpret = knobs.runtime.interpret, True
    try:
        module = importlib.import_module(name)
        for other in KERNELS:
            _use_interpreted_language(sys.modules.get(other))
        return module
    finally:
        knobs.runtime.interpret = was
        for other, module in before.items():
            sys.modules.pop(other, None)
            parent, _, child = other.rpartition(".")
            if module is not None:
                sys.modules[other] = module
                setattr(sys.modules[parent], child, module)
            elif hasattr(sys.modules.get(parent), child):
                delattr(sys.modules[parent], child)


def _use_interpreted_language(module: ModuleType | None) -> None:
    """Let every kernel of `module` run with Triton's own functions interpreted too."""
    for kernel in vars(module).values() if module else ():
        if isinstance(kernel, InterpretedFunction) and "run" not in vars(kernel):
            _wrap(kernel)


def _wrap(kernel: InterpretedFunction) -> None:
    run = kernel.run

    def wrapped(*args: Any, **options: Any) -> Any:
        with _interpreted_language():
            return run(*args, **options)

    kernel.run = wrapped


def _dot(
    self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, d: TensorHandle, *how: Any
) -> TensorHandle:
    """A B + D. Numbers in bfloat16 are kept as integers, and the interpreter would multiply these."""
    left, right = (_float32(x) if x.dtype == tl.bfloat16 else x.data for x in (a, b))
    return TensorHandle(np.matmul(left, right, dtype=d.data.dtype) + d.data, d.dtype.scalar)


def _float32(x: TensorHandle) -> np.ndarray:
    return (x.data.astype(np.uint32) << 16).view(np.float32)


@contextmanager
def _interpreted_language() -> Iterator[None]:
    """Functions such as `tl.sum` are kernels themselves, made for compiling when Triton was imported.

    Everything is put back afterwards: the interpreter leaves some of its own functions behind.
    """
    places = (tl, tl.core, tl.standard, tl.core.tensor, tl.math, InterpretedFunction, InterpreterBuilder)
    before = [dict(vars(place)) for place in places]
    for place in (tl, tl.standard):
        for name, value in list(vars(place).items()):
            if isinstance(value, JITFunction):
                setattr(place, name, InterpretedFunction(value.fn))
    exchanged = interpreter._patch_lang(tl.standard.zeros.fn)
    # Else the language would be exchanged at every call of a device function, which takes most of the time.
    InterpretedFunction.__call__ = lambda self, *args, **options: self.rewrite()(*args, **options)
    InterpreterBuilder.create_dot = _dot
    try:
        yield
    finally:
        exchanged.restore()
        for place, names in zip(places, before, strict=True):
            for name, value in names.items():
                if vars(place)[name] is not value:
                    setattr(place, name, value)
