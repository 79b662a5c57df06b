"""Drawing the next token from logits."""

from __future__ import annotations

from numbers import Integral, Real

import torch
from torch import Tensor


def sample_token(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw one token per row; the same generator state gives the same tokens.

    Args:
        logits: `[B, V]`.
        temperature: divides the logits; 0 = the most likely token (`top_k` and `top_p` do not matter then).
        top_k: draw from the k most likely tokens only; all, if there are fewer.
        top_p: draw from the smallest set of most likely tokens whose probability reaches `top_p`, taken
            after `temperature` and `top_k`.
        generator: source of randomness, on the device of `logits`; None = torch's global one.

    Returns:
        Token numbers `[B]`, int64.

    Raises:
        ValueError: naming the argument out of range.
    """
    if logits.dim() != 2:
        raise ValueError(f"logits must have shape [B, V], got {list(logits.shape)}")
    _check_temperature(temperature)
    _check_limits(top_k, top_p)
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits.float()
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature  # no overflow at a tiny temperature
    probabilities = truncate(logits, top_k, top_p).softmax(dim=-1)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)


def truncate(logits: Tensor, top_k: int | None = None, top_p: float | None = None) -> Tensor:
    """`logits [B, V]` with −inf for every token outside of top-k, then top-p; see `sample_token`.

    Equally likely tokens are taken in the order of their numbers.
    """
    _check_limits(top_k, top_p)
    if top_k is None and (top_p is None or top_p == 1):
        return logits
    ranked, order = logits.sort(dim=-1, descending=True, stable=True)
    if top_k is not None:
        ranked[:, top_k:] = -torch.inf
    if top_p is not None and top_p < 1:  # at 1, rounding of the sum must not cost the last token
        mass = ranked.softmax(dim=-1).cumsum(dim=-1)
        reached = mass[:, :-1] >= top_p  # by the tokens before, for tokens 1, 2, …
        ranked[:, 1:] = ranked[:, 1:].masked_fill(reached, -torch.inf)
    return torch.empty_like(ranked).scatter_(-1, order, ranked)


def check_sampling(
    max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None, seed: int | None
) -> None:
    """Refuse what `generate` cannot use, before the prompt is read.

    Raises:
        ValueError: naming the argument.
    """
    check_count("max_new_tokens", max_new_tokens, 0)
    _check_temperature(temperature)
    _check_limits(top_k, top_p)
    if seed is not None and (not _is_whole(seed) or not -(2**63) <= seed < 2**64):
        raise ValueError(f"seed must be an integer of 64 bits or None, got {seed!r}")


def check_count(name: str, value: int, least: int) -> None:
    """Refuse a number that is not whole, or is less than `least`. Raises ValueError."""
    if not _is_whole(value) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")


def _is_whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _check_temperature(temperature: float) -> None:
    if not isinstance(temperature, Real) or not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be at least 0 and finite, got {temperature!r}")


def _check_limits(top_k: int | None, top_p: float | None) -> None:
    if top_k is not None and (not _is_whole(top_k) or top_k < 1):
        raise ValueError(f"top_k must be at least 1 or None, got {top_k!r}")
    if top_p is not None and not (isinstance(top_p, Real) and 0 < top_p <= 1):
        raise ValueError(f"top_p must be in (0, 1] or None, got {top_p!r}")
