"""The comparison model: `titans_pytorch.NeuralMemory` in the library's own block structure."""

from __future__ import annotations

import importlib.util
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nested_learning.layers.mlp import SwiGLU, swiglu_width
from nested_learning.layers.norm import RMSNorm
from nested_learning.models.config import HopeConfig


def peer_installed() -> bool:
    """Whether the package titans-pytorch (extra `bench`) can be imported."""
    return importlib.util.find_spec("titans_pytorch") is not None


class PeerBlock(nn.Module):
    """x + NeuralMemory(norm(x)), then x + SwiGLU(norm(x)).

    The memory is an MLP of two layers per head, with the hidden width that `config` gives to the `titans`
    mixer; everything else is the package's default (so it has momentum, which the `titans` mixer has not).
    """

    def __init__(self, config: HopeConfig) -> None:
        super().__init__()
        from titans_pytorch import MemoryMLP, NeuralMemory

        hidden = config.memory.hidden or config.head_dim
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.mixer = NeuralMemory(
            dim=config.dim,
            dim_head=config.head_dim,
            heads=config.num_heads,
            chunk_size=config.chunk_size,
            model=MemoryMLP(config.head_dim, depth=2, expansion_factor=hidden / config.head_dim),
        )
        for (
            weight
        ) in self.mixer.memory_model_parameters:  # views that repeat one head, which optimizers refuse
            weight.data = weight.data.clone(memory_format=torch.contiguous_format)
        self.mlp_norm = RMSNorm(config.dim, config.norm_eps)
        self.mlp = SwiGLU(config.dim, swiglu_width(config.dim))

    def forward(self, x: Tensor) -> Tensor:
        """`x [B, T, D]` to the same shape."""
        x = x + self.mixer(self.norm(x))[0]
        y: Tensor = self.mlp(self.mlp_norm(x))[0]
        return x + y


class PeerLM(nn.Module):
    """Embedding, `PeerBlock`s, norm and tied head, with the sizes of `config`."""

    def __init__(self, config: HopeConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        nn.init.normal_(self.embedding.weight, std=1 / math.sqrt(config.dim))
        self.blocks = nn.ModuleList(PeerBlock(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)

    def forward(self, tokens: Tensor, state: None = None) -> tuple[Tensor, None]:
        """`tokens [B, T]` → (`logits [B, T, V]`, None): whole sequences only, no carried state."""
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.embedding.weight.to(x.dtype)), None
