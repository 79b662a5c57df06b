"""Our Triton kernels in Triton's interpreter, which runs them on the CPU."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

from triton import knobs

KERNELS = (
    "nested_learning.ops.tiles",
    "nested_learning.ops.delta_rule.triton",
    "nested_learning.ops.self_modifying.triton",
)
"""Modules with kernels. `triton.jit` decides when a module is imported whether its kernels are interpreted."""


def interpreted(name: str) -> ModuleType:
    """A second copy of the module `name`, and of those with kernels that it imports, for the interpreter."""
    before = {other: sys.modules.pop(other, None) for other in KERNELS}
    was, knobs.runtime.interpret = knobs.runtime.interpret, True
    try:
        return importlib.import_module(name)
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
