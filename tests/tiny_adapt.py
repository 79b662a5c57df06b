"""Tiny models and texts for the tests of learning at test time, in float64."""

import torch
from small_models import hope
from torch import Tensor

from nested_learning.levels import LevelSpec
from nested_learning.models.lm import HopeLM

VOCAB = 13
FAST = LevelSpec(name="fast", chunk_size=4)
PLAIN = LevelSpec(name="mlp")


def tiny(mixer: str = "self_mod", levels: tuple[LevelSpec, ...] = (FAST, PLAIN), seed: int = 0) -> HopeLM:
    """Two blocks of width 8; weights are large enough for gradients of every path to matter."""
    torch.manual_seed(seed)
    config = hope(
        vocab_size=VOCAB,
        dim=8,
        num_layers=2,
        num_heads=2,
        mixer=mixer,
        levels=levels,
        chunk_size=4,
        window=5,
    )
    model = HopeLM(config).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def text(batch: int = 3, length: int = 22, seed: int = 1) -> Tensor:
    """Tokens `[batch, length]`."""
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))
