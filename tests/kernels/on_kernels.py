"""Layers on the kernels of Triton's interpreter, and beside themselves on PyTorch's path."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

WIDTH = 32


def install(kernels: ModuleType, package: ModuleType, layers: ModuleType, patch: pytest.MonkeyPatch) -> None:
    """Let the layers of a module take interpreted kernels in place of the module `triton` of `package`."""
    patch.setitem(sys.modules, f"{package.__name__}.triton", kernels)
    patch.setattr(package, "triton", kernels)
    patch.setattr(layers, "use_triton", lambda device: True)


def run(layer: nn.Module, lengths: tuple[int, ...]) -> list[Tensor]:
    """Answers to a sequence in calls of these lengths, the last state, and gradients of all parameters."""
    layer.zero_grad()
    x = torch.randn(2, sum(lengths), WIDTH, generator=torch.Generator().manual_seed(1), requires_grad=True)
    answers: list[Tensor] = []
    state: Any = None
    for part in x.split(lengths, 1):
        y, state = layer(part, state)
        answers.append(y)
    whole = torch.cat(answers, 1)
    held = list(state.tensors())
    (whole.square().sin().sum() + sum(t.square().sum() for t in held)).backward()
    return [whole, *held, x.grad, *(p.grad for p in layer.parameters())]  # type: ignore[list-item]


def assert_same(found: list[Tensor], exact: list[Tensor]) -> None:
    """As close as float32 is, with sums in other orders."""
    for a, b in zip(found, exact, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=2e-5 * float(b.detach().abs().max()))
