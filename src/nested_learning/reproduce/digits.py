"""A tiny vision transformer on scikit-learn's handwritten digits (1,797 images of 8 × 8 pixels).

Shapes: images `[N, 8, 8]`, patches of 2 × 2 → tokens `[N, 16, 4]`, logits `[N, 1, 10]`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from nested_learning.extras import MissingExtraError
from nested_learning.optim.config import OptimConfig
from nested_learning.reproduce.runner import Result, Tick
from nested_learning.runtime import set_seed
from nested_learning.train.objective import next_token_loss
from nested_learning.train.plain_loop import Batch, Loop, device_of, finite_or_none, train_steps

PIXELS, PATCH, CLASSES = 8, 2, 10
VALID, TEST = 297, 300  # of 1,797; the rest is for training


class TinyViT(nn.Module):
    """Patches, learned positions, pre-norm transformer blocks, mean over tokens, linear head.

    Args:
        dim, layers, heads: width, blocks, attention heads.
    """

    def __init__(self, dim: int = 64, layers: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.patch = nn.Linear(PATCH * PATCH, dim)
        self.position = nn.Embedding((PIXELS // PATCH) ** 2, dim)
        nn.init.normal_(self.position.weight, std=0.02)
        options: dict[str, Any] = {
            "dropout": 0.0,
            "activation": "gelu",
            "batch_first": True,
            "norm_first": True,
        }
        blocks = [nn.TransformerEncoderLayer(dim, heads, 4 * dim, **options) for _ in range(layers)]
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, CLASSES)

    def forward(self, images: Tensor) -> tuple[Tensor, None]:
        """`images [N, 8, 8]` → (`logits [N, 1, 10]`, None), as a language model of one token would."""
        x = self.patch(to_patches(images)) + self.position.weight
        return self.head(self.norm(self.blocks(x)).mean(1, keepdim=True)), None


def to_patches(images: Tensor) -> Tensor:
    """`[N, 8, 8]` → `[N, 16, 4]`, row by row."""
    cut = images.unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH)
    return cut.reshape(len(images), -1, PATCH * PATCH)


@cache
def digits() -> tuple[Batch, Batch, Batch]:
    """Training, validation and test images `[N, 8, 8]` in [0, 1] with labels `[N, 1]`; always the same split.

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingExtraError("the handwritten digits", "sklearn") from error

    data = load_digits()
    images, labels = torch.tensor(data.images).float() / 16, torch.tensor(data.target)[:, None]
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    sizes = [len(images) - VALID - TEST, VALID, TEST]
    parts = torch.split(order, sizes)
    train, valid, test = ((images[part], labels[part]) for part in parts)
    return train, valid, test


@dataclass(frozen=True, kw_only=True, slots=True)
class DigitsRun:
    """One training of `TinyViT`. The seed decides the initial weights and the batches."""

    optim: OptimConfig
    steps: int
    seed: int = 0
    batch_size: int = 64
    eval_every: int = 20

    def run(self, tick: Tick) -> Result:
        """Train. `final`: validation loss in nats, None if not finite; `test` and `accuracy`: on the test
        part; and the history of the loop."""
        train, valid, test = digits()
        set_seed(self.seed)
        model = TinyViT()
        loop = Loop(steps=self.steps, eval_every=self.eval_every)

        def evaluate(trained: nn.Module) -> float:
            return float(next_token_loss(trained(valid[0])[0], valid[1]))

        history = train_steps(model, self._batches(train), self.optim, loop, evaluate, tick)
        with torch.no_grad():
            logits = model(test[0].to(device_of(model)))[0].cpu()
        return {
            "final": finite_or_none(history.curve[-1][1]),
            "test": finite_or_none(float(next_token_loss(logits, test[1]))),
            "accuracy": float((logits.argmax(-1) == test[1]).float().mean()),
            "parameters": sum(p.numel() for p in model.parameters()),
            **history.to_result(),
        }

    def _batches(self, train: Batch) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(self.seed)
        while True:
            order = torch.randperm(len(train[0]), generator=generator)
            for chosen in torch.split(order, self.batch_size)[:-1]:  # the last one is not full
                yield train[0][chosen], train[1][chosen]
