"""Drawing the next token from logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import TypedDict

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
    probabilities = _probabilities(logits, temperature, top_k, top_p)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)


def _probabilities(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None) -> Tensor:
    """`[B, V]`, of `logits [B, V]`; `temperature` is above 0."""
    logits = logits.float()
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature  # no overflow at a tiny temperature
    return truncate(logits, top_k, top_p).softmax(dim=-1)


class SamplerOptions(TypedDict, total=False):
    """The arguments of `Sampler`, for functions that hand them on."""

    max_new_tokens: int
    temperature: float
    top_k: int | None
    top_p: float | None
    seed: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampler:
    """How a text is continued; see `sample_token`.

    Args:
        max_new_tokens: the most tokens that are drawn for a row.
        temperature, top_k, top_p: which tokens may come.
        seed: row i draws from a generator of its own with seed + i, so that what is drawn for it does not
            depend on the other rows; None = all rows from torch's global generator.

    Raises:
        ValueError: naming the argument out of range.
    """

    max_new_tokens: int = 128
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        check_sampling(self.max_new_tokens, self.temperature, self.top_k, self.top_p, self.seed)

    def generators(self, rows: int, device: torch.device) -> list[torch.Generator | None]:
        """The generator of every row."""
        if self.seed is None:
            return [None] * rows
        seeds = [(self.seed + row) % 2**64 for row in range(rows)]
        return [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def draw(self, logits: Tensor, generators: Sequence[torch.Generator | None]) -> Tensor:
        """A token `[n]` for every row of `logits [n, V]`, from its own generator."""
        if self.temperature == 0 or self.seed is None or len(generators) == 1:
            return sample_token(logits, self.temperature, self.top_k, self.top_p, generators[0])
        rows = _probabilities(logits, self.temperature, self.top_k, self.top_p)
        pairs = zip(rows, generators, strict=True)
        return torch.cat([torch.multinomial(row, 1, generator=generator) for row, generator in pairs])


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
