"""`torch.compile` where it pays: shapes that repeat, no loop over chunks inside a graph."""

from __future__ import annotations

import logging
import warnings

import torch
from torch import nn

from nested_learning.layers.attention import Attention
from nested_learning.layers.mlp import SwiGLU

GRAPHS = 64
"""Graphs of one function that a process may compile. Every batch, length and chunk size wants its own."""


def compile_model(model: nn.Module) -> None:
    """Compile the repeated parts of `model` in place.

    Attention and MLPs as modules; layers with memories run one chunk as one graph (see `ops/scan.py`). The
    loop over chunks stays in Python: a graph of the whole layer would unroll it, and compile for minutes.
    """
    warnings.filterwarnings("ignore", message=".*_prims_common.check", category=FutureWarning)  # torch's own
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # "No CUDA runtime is found"
    torch._dynamo.config.recompile_limit = max(GRAPHS, torch._dynamo.config.recompile_limit)
    for module in model.modules():
        if isinstance(module, (Attention, SwiGLU)):
            module.compile()
        elif hasattr(module, "compiled"):
            module.compiled = True  # type: ignore[assignment]
