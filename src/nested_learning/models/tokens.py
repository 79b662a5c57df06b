"""What a language model takes as tokens."""

from __future__ import annotations

from collections.abc import Sequence

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
            f"tokens must be a tensor [batch, length], got {describe(tokens)} (`generate` takes lists of "
            "different lengths, too)"
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


def prompt_rows(
    prompts: Tensor | Sequence[Sequence[int]], room: int, vocab_size: int, device: torch.device
) -> tuple[list[int], Tensor]:
    """Lengths of prompts, and a tensor `[B, longest + room]` int64 with the prompts on its left.

    Args:
        prompts: `[B, T]`, or lists of tokens of any lengths.
        device: where lists are put.

    Raises:
        TypeError: tokens that are no integers.
        ValueError: a prompt without tokens, no prompt, or a token outside of the vocabulary.
    """
    if isinstance(prompts, Tensor):
        check_prompt(prompts, vocab_size)
        spare = prompts.new_zeros(len(prompts), room, dtype=torch.int64)
        return [prompts.shape[1]] * len(prompts), torch.cat([prompts, spare], 1)
    rows = [list(row) for row in _listed(prompts)]
    for number, row in enumerate(rows):
        for token in row:
            if not isinstance(token, int) or isinstance(token, bool):
                raise TypeError(f"tokens of prompt {number} must be integers, got {token!r}")
            if not 0 <= token < vocab_size:
                raise ValueError(f"tokens must be from 0 to {vocab_size - 1}, got {token} in prompt {number}")
    lengths = [len(row) for row in rows]
    if not lengths or not min(lengths):
        raise ValueError(f"prompts must be at least one, of at least one token each; got lengths {lengths}")
    width = max(lengths)
    padded = torch.tensor([row + [0] * (width + room - len(row)) for row in rows], dtype=torch.int64)
    return lengths, padded.to(device)


def _listed(prompts: Sequence[Sequence[int]]) -> Sequence[Sequence[int]]:
    whole = isinstance(prompts, Sequence) and not isinstance(prompts, str)
    if not whole or not all(isinstance(row, Sequence) and not isinstance(row, str) for row in prompts):
        raise TypeError(
            f"prompts must be a tensor [batch, length] or lists of tokens, got {describe(prompts)} "
            "(for texts see `generate_text` and `stream`)"
        )
    return prompts
