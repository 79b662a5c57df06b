"""What is timed: a training step, a forward pass, a run of decoding."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from nested_learning.bench.settings import BenchSettings
from nested_learning.bench.timing import Run
from nested_learning.train.objective import next_token_loss

BLOCK = 2048  # tokens read at a time on the way to a position


def random_tokens(settings: BenchSettings, batch: int, length: int) -> Tensor:
    """`[batch, length]`, always the same."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(settings.vocab, (batch, length), generator=generator)
    return tokens.to(settings.device)


def precision(settings: BenchSettings) -> AbstractContextManager[Any]:
    """Autocast to bfloat16, or nothing to speak of in fp32."""
    device = torch.device(settings.device).type
    return torch.autocast(device, torch.bfloat16, enabled=settings.precision == "bf16")


def training_step(model: nn.Module, settings: BenchSettings, batch: int, length: int) -> Run:
    """Forward, loss and backward (and AdamW's step if `settings.optimizer`)."""
    tokens = random_tokens(settings, batch, length + 1)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    optimizer = torch.optim.AdamW(model.parameters()) if settings.optimizer else None

    def step() -> None:
        model.zero_grad(set_to_none=True)
        with precision(settings):
            loss = next_token_loss(model(inputs)[0], targets)
        loss.backward()  # type: ignore[no-untyped-call]
        if optimizer is not None:
            optimizer.step()

    return step


def forward_pass(model: nn.Module, settings: BenchSettings, batch: int, length: int) -> Run:
    """Logits of a whole sequence, without gradients."""
    tokens = random_tokens(settings, batch, length)

    def forward() -> None:
        with torch.no_grad(), precision(settings):
            model(tokens)

    return forward


class Decoding:
    """Reads a prefix in big blocks, then decodes some tokens at each call, one at a time, always further on.

    Args:
        position: tokens of the prefix.
        tokens: tokens decoded per call.
    """

    def __init__(self, model: nn.Module, settings: BenchSettings, position: int, tokens: int) -> None:
        self.model, self.settings = model, settings
        self.state: Any = None
        prefix = random_tokens(settings, settings.decode_batch, position)
        for first in range(0, position, BLOCK):
            self._read(prefix[:, first : first + BLOCK])
        self.next = random_tokens(settings, settings.decode_batch, tokens)
        self.one: Callable[[Tensor], object] = self._read  # reads one token

    def __call__(self) -> None:
        """Decode; the token read next does not depend on the logits, so that nothing waits for them."""
        with torch.no_grad(), precision(self.settings):
            for i in range(self.next.shape[1]):
                self.one(self.next[:, i : i + 1])

    def _read(self, tokens: Tensor) -> None:
        with torch.no_grad(), precision(self.settings):
            _, self.state = self.model(tokens, self.state)

    def state_floats(self) -> int:
        """Numbers that the state holds per sequence."""
        assert self.state is not None
        return int(self.state.numel()) // self.settings.decode_batch
