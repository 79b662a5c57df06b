"""What a language model takes as tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from nested_learning.layers.checks import describe


def check_tokens(tokens: Tensor) -> None:
    """Refuse what is not `[B, T]` integers, with B and T of at least 1. Reads no token.

    Raises:
        TypeError: no tensor of int64 or int32.
        ValueError: another shape.
    """
    if not isinstance(tokens, Tensor):
        raise TypeError(
            f"tokens must be a tensor [batch, length], got {describe(tokens)} (texts of different lengths go "
            "one by one)"
        )
    if tokens.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"tokens must be int64 or int32, got {tokens.dtype}")
    if tokens.dim() != 2 or 0 in tokens.shape:
        raise ValueError(
            f"tokens must be [batch, length] with batch and length of at least 1, got {list(tokens.shape)}"
        )


def check_range(tokens: Tensor, vocab_size: int) -> None:
    """Refuse tokens outside of the vocabulary. The host waits for the device.

    Raises:
        ValueError: naming the first of them.
    """
    wrong = tokens[(tokens < 0) | (tokens >= vocab_size)]
    if len(wrong):
        raise ValueError(f"tokens must be from 0 to {vocab_size - 1}, got {int(wrong[0])}")


def check_prompt(tokens: Tensor, vocab_size: int) -> None:
    """Both checks, for tokens that are read once and not in a loop. Raises as they do."""
    check_tokens(tokens)
    check_range(tokens, vocab_size)
