"""Four texts of clearly different kinds, byte by byte, to be learned in a row.

Shapes: tokens `[N]`; a row is `[seq_len + 1]`, a batch `[B, seq_len + 1]`, int64.
"""

from __future__ import annotations

import random
import string
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from nested_learning.data.corpus import bundled_files, split_validation
from nested_learning.data.loader import TokenLoader
from nested_learning.data.records import read_text
from nested_learning.train.plain_loop import Batch

DOMAINS = ("scripture", "plays", "cipher", "novel")
VALID = 0.05
Bytes = npt.NDArray[np.uint8]


def domain_text(name: str) -> str:
    """A bundled text by name; "cipher" is the speeches in another alphabet: every letter stands for another.

    Raises ValueError for a name that does not exist.
    """
    files = {path.stem: path for path in bundled_files()}
    if name != "cipher":
        if name not in files:
            raise ValueError(f"domains must be of {', '.join([*files, 'cipher'])}, got {name!r}")
        return read_text(files[name])
    letters = list(string.ascii_lowercase)
    random.Random(0).shuffle(letters)
    other = "".join(letters)
    table = str.maketrans(string.ascii_letters, other + other.upper())
    return read_text(files["speeches"]).translate(table)


def domain_tokens(name: str) -> tuple[Bytes, Bytes]:
    """Training and held-out bytes of a domain; held out is the end of the text."""
    parts = split_validation(domain_text(name), VALID)
    train, valid = (np.frombuffer(part.encode(), dtype=np.uint8) for part in parts)
    return train, valid


def training_batches(
    new: TokenLoader, earlier: list[TokenLoader], replayed: float, rng: random.Random
) -> Iterator[Batch]:
    """Batches of `new`, the part `replayed` of their rows exchanged for rows of `earlier`, chosen at random.

    Args:
        earlier: loaders of one row at a time; without any, nothing is exchanged.
    """
    for rows in new:
        for i in range(round(replayed * len(rows)) if earlier else 0):
            rows[i] = next(rng.choice(earlier))[0]
        yield rows[:, :-1], rows[:, 1:]
