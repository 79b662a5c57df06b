"""A language model on LSTM layers, as a baseline that tracks states by construction."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from nested_learning.checks import at_least, check_types


@dataclass(kw_only=True, slots=True)
class LSTMConfig:
    """Sizes of an `LSTMModel`: vocabulary, width and layers."""

    vocab_size: int
    dim: int
    num_layers: int

    def __post_init__(self) -> None:
        check_types(self, "lstm")
        for name in ("vocab_size", "dim", "num_layers"):
            at_least(f"lstm.{name}", getattr(self, name), 1)


class LSTMModel(nn.Module):
    """Embedding, LSTM layers of one width, head. Shapes: B batch, T tokens, V vocabulary."""

    def __init__(self, config: LSTMConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.LSTM(config.dim, config.dim, config.num_layers, batch_first=True)
        self.head = nn.Linear(config.dim, config.vocab_size)

    def forward(
        self, tokens: Tensor, state: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """`tokens [B, T]` → (`logits [B, T, V]`, state). `state=None` starts a context."""
        y, state = self.layers(self.embedding(tokens), state)
        return self.head(y), state
