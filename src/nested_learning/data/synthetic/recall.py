"""Multi-query key-value recall (MQAR), after Arora et al., "Zoology" (arXiv 2312.04927)."""

from __future__ import annotations

import torch
from torch import Tensor

from nested_learning.data.padding import IGNORE


def recall_batch(
    batch_size: int, num_pairs: int = 8, vocab_size: int = 64, generator: torch.Generator | None = None
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

    Zoology distributes its queries by a power law among filler tokens; here they follow one another.
    Both tensors are int64, on the generator's device.

    Raises:
        ValueError: more pairs than keys.
    """
    num_keys = vocab_size // 2
    if not 1 <= num_pairs <= num_keys:
        raise ValueError(f"num_pairs={num_pairs} must lie between 1 and vocab_size // 2 = {num_keys}")
    device = generator.device if generator is not None else torch.device("cpu")

    def shuffled(count: int) -> Tensor:  # a random order of 0 .. count-1 per row: [B, count]
        return torch.rand(batch_size, count, generator=generator, device=device).argsort(dim=1)

    keys = shuffled(num_keys)[:, :num_pairs]  # [B, P]
    values = torch.randint(num_keys, vocab_size, keys.shape, generator=generator, device=device)
    order = shuffled(num_pairs)
    queries, answers = keys.gather(1, order), values.gather(1, order)

    stated = torch.stack((keys, values), dim=2).flatten(1)  # [B, 2P]
    asked = torch.stack((queries, answers), dim=2).flatten(1)  # [B, 2P]
    tokens = torch.cat((stated, asked), dim=1)
    targets = torch.full_like(tokens, IGNORE)
    targets[:, 2 * num_pairs :: 2] = answers
    return tokens, targets
