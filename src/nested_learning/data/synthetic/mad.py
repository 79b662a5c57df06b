"""The six tasks of the MAD suite, after Poli et al., "Mechanistic Design and Scaling of Hybrid Architectures"
(arXiv 2403.17844): in-context recall (plain, fuzzy, noisy), selective copying, memorization, compression.

Every task is a function `(batch, generator, settings) -> (tokens, targets)`, both `[B, T]` int64 and T =
`settings.length`: `targets[:, t]` is what a model has to answer when it has read `tokens[:, : t + 1]`, and
-100 where nothing is asked. All draw fresh sequences, where the suite has 12,800 fixed ones.

Sizes are in `TASKS`, the baseline of the suite cut down to minutes of a CPU. Vocabularies are the suite's,
but for memorization, where a table of 127 keys was learned at once and is one of 511 here. Lengths are 48
instead of 128 (recall) and 256 (copying, of 8 tokens instead of 16), and 16 instead of 32 (compression). Of
the tasks themselves differ:

* recall is trained on the values of keys seen before, on which the suite only tests; it trains on every next
  token, most of which cannot be known.
* fuzzy recall draws its keys from a few motifs per sequence, in training and test; the suite draws from all
  motifs, so that often only the last key of a sequence was there before, and tests on the longest keys.
* memorization draws the sequences of its one table anew, where the suite repeats 256 of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nested_learning.data.padding import IGNORE

TABLE_SEED = 12345


@dataclass(frozen=True, kw_only=True, slots=True)
class MadSettings:
    """Sizes of a task.

    Args:
        vocab_size: number of tokens, those of noise included.
        length: tokens of a sequence.
        noise: share of key-value pairs that are noise (recall).
        noise_tokens: tokens that are only noise (recall).
        motif: most tokens of a key or value (fuzzy recall).
        motifs: keys of a sequence (fuzzy recall).
        copied: tokens to copy (selective copying).
    """

    vocab_size: int
    length: int
    noise: float = 0.0
    noise_tokens: int = 0
    motif: int = 3
    motifs: int = 4
    copied: int = 8


Draw = Callable[[int, torch.Generator, MadSettings], tuple[Tensor, Tensor]]


def in_context_recall(batch: int, generator: torch.Generator, settings: MadSettings) -> tuple[Tensor, Tensor]:
    """k v k v …: a key has the same value all along; asked for at every key that was there before.

    The lower half of the tokens without noise are keys, the others values. A share `noise` of the pairs is
    two tokens of noise, which nothing is asked about.

    Raises:
        ValueError: an odd length, or fewer than two keys, values or (with noise) tokens of noise.
    """
    known = settings.vocab_size - settings.noise_tokens
    half, pairs = known // 2, settings.length // 2
    _check(settings.length % 2 == 0, f"length must be even, got {settings.length}")
    _check(half >= 2, f"vocab_size without noise_tokens must be at least 4, got {known}")
    _check(
        settings.noise == 0 or settings.noise_tokens >= 1, "noise_tokens must be at least 1 if there is noise"
    )
    table = torch.randint(half, known, (batch, half), generator=generator)
    keys = torch.randint(half, (batch, pairs), generator=generator)
    values = table.gather(1, keys)
    is_noise = torch.rand(batch, pairs, generator=generator) < settings.noise
    same = (keys[:, :, None] == keys[:, None, :]) & ~is_noise[:, None, :]
    before = same.tril(-1).any(-1)  # [B, P]: the key of pair i is that of an earlier pair
    asked = torch.where(before & ~is_noise, values, IGNORE)
    noise = torch.randint(settings.noise_tokens or 1, (batch, pairs, 2), generator=generator) + known
    tokens = torch.where(is_noise[..., None], noise, torch.stack((keys, values), -1))
    targets = torch.stack((asked, torch.full_like(asked, IGNORE)), -1)
    return tokens.flatten(1), targets.flatten(1)


def fuzzy_recall(batch: int, generator: torch.Generator, settings: MadSettings) -> tuple[Tensor, Tensor]:
    """Recall with keys and values of 1 to `motif` tokens, all different; every token of a value is asked for.

    A sequence has `motifs` different keys, each with its value. It is filled from the left with the last
    token, as its pairs do not end at a length known before.

    Raises:
        ValueError: no room for the pairs, or too few tokens for the motifs.
    """
    half = (settings.vocab_size - 1) // 2
    _check(half >= settings.motif, f"vocab_size must be at least {2 * settings.motif + 1}")
    _check(settings.motifs <= half, f"motifs must be at most {half}, got {settings.motifs}")
    _check(settings.length >= 4 * settings.motif, f"length must be at least {4 * settings.motif}")
    rows = [_fuzzy_row(generator, settings, half) for _ in range(batch)]
    tokens, targets = (torch.tensor(side) for side in zip(*rows, strict=True))
    return tokens, targets


def _fuzzy_row(generator: torch.Generator, settings: MadSettings, half: int) -> tuple[list[int], list[int]]:
    def motif(first: int, count: int) -> tuple[int, ...]:
        size = int(torch.randint(1, settings.motif + 1, (1,), generator=generator))
        order: list[int] = torch.randperm(count, generator=generator)[:size].tolist()
        return tuple(first + token for token in order)

    table: dict[tuple[int, ...], tuple[int, ...]] = {}
    while len(table) < settings.motifs:
        table.setdefault(motif(0, half), motif(half, settings.vocab_size - 1 - half))
    keys, seen = list(table), set[tuple[int, ...]]()
    tokens, targets = list[int](), list[int]()
    for draw in torch.randint(len(keys), (settings.length,), generator=generator).tolist():
        key, value = keys[draw], table[keys[draw]]
        if len(tokens) + len(key) + len(value) > settings.length:
            break
        tokens += key + value
        asked = value if key in seen else (IGNORE,) * len(value)
        targets += [IGNORE] * (len(key) - 1) + [*asked, IGNORE]
        seen.add(key)
    pad = settings.length - len(tokens)
    return [settings.vocab_size - 1] * pad + tokens, [IGNORE] * pad + targets


def selective_copying(batch: int, generator: torch.Generator, settings: MadSettings) -> tuple[Tensor, Tensor]:
    """`copied` tokens at random places among blanks, the copy token, then blanks: the tokens, in order.

    Blank is the last token but one, copy the last one.

    Raises:
        ValueError: no room for the tokens, or no token that is neither blank nor copy.
    """
    count, blank = settings.copied, settings.vocab_size - 2
    room = settings.length - count - 1
    _check(room >= count, f"length must be at least {2 * count + 1} to copy {count}, got {settings.length}")
    _check(blank >= 1, f"vocab_size must be at least 3, got {settings.vocab_size}")
    copied = torch.randint(blank, (batch, count), generator=generator)
    places = torch.rand(batch, room, generator=generator).argsort(1)[:, :count].sort(1).values
    tokens = torch.full((batch, settings.length), blank)
    tokens.scatter_(1, places, copied)
    tokens[:, room] = blank + 1
    targets = torch.full_like(tokens, IGNORE)
    targets[:, room + 1 :] = copied
    return tokens, targets


def memorization(batch: int, generator: torch.Generator, settings: MadSettings) -> tuple[Tensor, Tensor]:
    """k ? k ? …: at every ?, the last token, the value that one table of all sequences has for the key.

    Raises:
        ValueError: an odd length, or fewer than two keys.
    """
    half = (settings.vocab_size - 1) // 2
    _check(settings.length % 2 == 0, f"length must be even, got {settings.length}")
    _check(half >= 2, f"vocab_size must be at least 5, got {settings.vocab_size}")
    keys = torch.randint(half, (batch, settings.length // 2), generator=generator)
    ask = torch.full_like(keys, settings.vocab_size - 1)
    targets = torch.stack((torch.full_like(keys, IGNORE), memorized_table(settings)[keys]), -1)
    return torch.stack((keys, ask), -1).flatten(1), targets.flatten(1)


def memorized_table(settings: MadSettings) -> Tensor:
    """The value of every key `[K]`: all values once, in an order that does not depend on the run."""
    half = (settings.vocab_size - 1) // 2
    return half + torch.randperm(half, generator=torch.Generator().manual_seed(TABLE_SEED))


def compression(batch: int, generator: torch.Generator, settings: MadSettings) -> tuple[Tensor, Tensor]:
    """Random tokens and the compression token, the last one; asked for are the random tokens where they are.

    The model has to answer from what it holds at the compression token alone: the targets are not those of
    a language model (see `reproduce.mad.Compressor`).

    Raises:
        ValueError: fewer than two tokens to draw from.
    """
    special = settings.vocab_size - 1
    _check(special >= 2, f"vocab_size must be at least 3, got {settings.vocab_size}")
    tokens = torch.randint(special, (batch, settings.length), generator=generator)
    tokens[:, -1] = special
    return tokens, torch.where(tokens == special, IGNORE, tokens)


def _check(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(message)


@dataclass(frozen=True, slots=True)
class MadTask:
    """A task of the suite: what tables call it, how to draw it, its sizes, and the share that guesses get."""

    label: str
    draw: Draw
    settings: MadSettings
    chance: float


TASKS: dict[str, MadTask] = {
    "recall": MadTask("recall", in_context_recall, MadSettings(vocab_size=16, length=48), 1 / 8),
    "fuzzy": MadTask("fuzzy recall", fuzzy_recall, MadSettings(vocab_size=16, length=48), 1 / 8),
    "noisy": MadTask(
        "noisy recall",
        in_context_recall,
        MadSettings(vocab_size=32, length=48, noise=0.2, noise_tokens=16),
        1 / 8,
    ),
    "copying": MadTask("selective copying", selective_copying, MadSettings(vocab_size=16, length=48), 1 / 14),
    "memorization": MadTask("memorization", memorization, MadSettings(vocab_size=1024, length=32), 1 / 511),
    "compression": MadTask("compression", compression, MadSettings(vocab_size=16, length=16), 1 / 15),
}
"""The tasks by name."""
