"""Multi-query key-value recall (MQAR), after Arora et al., "Zoology" (arXiv 2312.04927)."""

from __future__ import annotations

import torch
from torch import Tensor

from nested_learning.data.padding import IGNORE


def recall_batch(
    batch_size: int,
    num_pairs: int = 8,
    vocab_size: int = 64,
    generator: torch.Generator | None = None,
    overwritten: int = 0,
) -> tuple[Tensor, Tensor]:
    """Sequences that state P key-value pairs and then query each of them once.

    With P = `num_pairs` and T = 4P, each row of `tokens [B, T]` is

        k1 v1 k2 v2 ... kP vP   q1 a1 q2 a2 ... qP aP

    where the keys are distinct ids from `0 .. vocab_size // 2 - 1`, the values are independent draws (repeats
    allowed, so that earlier answers do not reveal later ones) from `vocab_size // 2 .. vocab_size - 1`,
    `q` is a random order of the keys, and `a` are their values.

    `targets [B, T]` is already shifted: at the position of a query it holds that query's value, the token
    that follows; elsewhere -100. So `logits[:, t]` is compared with `targets[:, t]`, and blind guessing
    among the values is right once in `vocab_size / 2` times.

    With R = `overwritten`, R of the keys are stated twice, the second time with another value, and the later
    value is their answer. The P + R statements are in random order, and T = 4P + 2R.

    Zoology distributes its queries by a power law among filler tokens; here they follow one another.
    Both tensors are int64, on the generator's device.

    Raises:
        ValueError: more pairs than keys, more overwritten keys than pairs, or no other value to write.
    """
    num_keys = vocab_size // 2
    if not 1 <= num_pairs <= num_keys:
        raise ValueError(f"num_pairs={num_pairs} must lie between 1 and vocab_size // 2 = {num_keys}")
    if not 0 <= overwritten <= num_pairs:
        raise ValueError(f"overwritten={overwritten} must lie between 0 and num_pairs = {num_pairs}")
    if overwritten and vocab_size - num_keys < 2:
        raise ValueError(f"vocab_size={vocab_size} has no second value for the overwritten keys")
    device = generator.device if generator is not None else torch.device("cpu")

    def shuffled(count: int) -> Tensor:  # a random order of 0 .. count-1 per row: [B, count]
        return torch.rand(batch_size, count, generator=generator, device=device).argsort(dim=1)

    keys = shuffled(num_keys)[:, :num_pairs]  # [B, P]
    values = torch.randint(num_keys, vocab_size, keys.shape, generator=generator, device=device)
    stated = torch.stack((keys, values), dim=2)  # [B, P, 2]
    if overwritten:
        stated, values = _overwrite(keys, values, overwritten, vocab_size, generator)
    order = shuffled(num_pairs)
    queries, answers = keys.gather(1, order), values.gather(1, order)

    asked = torch.stack((queries, answers), dim=2).flatten(1)  # [B, 2P]
    tokens = torch.cat((stated.flatten(1), asked), dim=1)  # [B, 2 (P + R) + 2P]
    targets = torch.full_like(tokens, IGNORE)
    targets[:, 2 * (num_pairs + overwritten) :: 2] = answers
    return tokens, targets


def _overwrite(
    keys: Tensor, values: Tensor, count: int, vocab_size: int, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Statements `[B, P + count, 2]` in random order, the first `count` keys twice; last values `[B, P]`."""
    low, device = vocab_size // 2, keys.device
    first = values[:, :count]
    others = vocab_size - low - 1
    ahead = torch.randint(1, others + 1, first.shape, generator=generator, device=device)
    new = low + (first - low + ahead) % (others + 1)  # any value but the first one
    written = torch.stack((torch.cat((keys, keys[:, :count]), 1), torch.cat((values, new), 1)), dim=2)

    at = torch.rand(written.shape[:2], generator=generator, device=device)  # of all orders, those in which …
    one, two = at[:, :count], at[:, keys.shape[1] :]
    at = torch.cat((one.minimum(two), at[:, count : keys.shape[1]], one.maximum(two)), 1)  # … new is later
    order = at.argsort(dim=1)[..., None].expand_as(written)
    return written.gather(1, order), torch.cat((new, values[:, count:]), 1)
