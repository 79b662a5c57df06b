"""A HOPE block inside a module of your own: forecasts of a series that has rules of its own.

    uv run python examples/hope_block_in_my_model.py [--mixer linear --steps 200]

notebooks/03_block_in_your_model.ipynb says what the task is, and compares mixers.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nested_learning import HopeBlock, HopeConfig, set_seed


# These lines are all that a model of yours needs: vectors in, vectors out, and a state that goes along.
class MyModel(nn.Module):
    """`x [B, T, channels]` → (forecasts `[B, T, channels]`, state)."""

    def __init__(self, channels: int, dim: int = 32, mixer: str = "self_mod") -> None:
        super().__init__()
        self.read = nn.Linear(channels, dim)
        self.block = HopeBlock(HopeConfig(dim=dim, num_heads=1, mixer=mixer, chunk_size=8))
        self.answer = nn.Linear(dim, channels)

    def forward(self, x, state=None):  # state=None: the start of a series
        h, state = self.block(self.read(x), state)
        return self.answer(h), state


def series(count: int, length: int = 49, channels: int = 4) -> Tensor:
    """`[count, length, channels]`: each series turns by a random rotation of its own, with noise of 0.1."""
    turn, _ = torch.linalg.qr(torch.randn(count, channels, channels))
    x, seen = torch.randn(count, channels), []
    for _ in range(length):
        seen.append(x + 0.1 * torch.randn(count, channels))
        x = torch.einsum("bij,bj->bi", turn, x)
    return torch.stack(seen, 1)


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Train, and say how well new series are forecast at their start and at their end."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mixer", default="self_mod")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--lr", type=float, default=1e-2)
    options = parser.parse_args(arguments)

    set_seed(0)
    model = MyModel(channels=4, mixer=options.mixer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr)
    for _ in range(options.steps):
        x = series(32)
        forecast, _ = model(x[:, :-1])
        loss = F.mse_loss(forecast, x[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    with torch.no_grad():
        x = series(256)
        forecast, state = model(x[:, :40])  # read 40 steps; then go on one by one, with the state
        errors = [(forecast - x[:, 1:41]).square().mean((0, 2))]
        for t in range(40, 48):
            forecast, state = model(x[:, t : t + 1], state)
            errors.append((forecast - x[:, t + 1 : t + 2]).square().mean((0, 2)))
    error = torch.cat(errors)
    found = {"first 4 steps": error[:4].mean().item(), "last 8 steps": error[-8:].mean().item()}
    print(", ".join(f"{name}: squared error {value:.3f}" for name, value in found.items()))
    return found


if __name__ == "__main__":
    main()
