"""`torch.compile` where it pays: shapes that repeat, no loop over chunks inside a graph."""

from __future__ import annotations

from torch import nn

from nested_learning.layers.attention import Attention
from nested_learning.layers.mlp import SwiGLU
from nested_learning.ops.memory_mlp import fused
from nested_learning.ops.self_modifying.scan import compile_chunks


def compile_model(model: nn.Module) -> None:
    """Compile the repeated parts of `model` in place.

    Attention and MLPs as modules, memory writes as the two functions of one chunk. The loop over chunks
    stays in Python: a graph of the whole layer would unroll it, and compile for minutes. Compiled writes
    serve every model of the process.
    """
    for module in model.modules():
        if isinstance(module, (Attention, SwiGLU)):
            module.compile()
    fused.compile_writes()
    compile_chunks()
