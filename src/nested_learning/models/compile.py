"""`torch.compile` where it pays: shapes that repeat, no loop over chunks inside a graph."""

from __future__ import annotations

import torch
from torch import nn

from nested_learning.layers.attention import Attention
from nested_learning.layers.mlp import SwiGLU
from nested_learning.ops.memory_mlp import fused
from nested_learning.ops.self_modifying.scan import compile_chunks

GRAPHS = 64
"""Graphs of one function that a process may compile. Every batch, length and chunk size wants its own."""


def compile_model(model: nn.Module) -> None:
    """Compile the repeated parts of `model` in place.

    Attention and MLPs as modules, memory writes as the two functions of one chunk. The loop over chunks
    stays in Python: a graph of the whole layer would unroll it, and compile for minutes. Compiled writes
    serve every model of the process.
    """
    torch._dynamo.config.recompile_limit = max(GRAPHS, torch._dynamo.config.recompile_limit)
    for module in model.modules():
        if isinstance(module, (Attention, SwiGLU)):
            module.compile()
    fused.compile_writes()
    compile_chunks()
