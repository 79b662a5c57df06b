"""Bits per byte on the held-out documents of shards that hold a token per byte.

Windows of one length, spread evenly over the held-out tokens and each read from a fresh state, so the first
bytes of a window have little to go by. The end of a document is a target, but no byte: it is paid for.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from nested_learning.checks import at_least
from nested_learning.data.corpus import open_corpus
from nested_learning.data.shards import TokenArray, Tokens
from nested_learning.data.tokenizer import ByteTokenizer
from nested_learning.eval.evaluation import Evaluation
from nested_learning.eval.loading import Loaded
from nested_learning.eval.perplexity import perplexity
from nested_learning.eval.results import Metric
from nested_learning.eval.scorer import read_losses
from nested_learning.log_lines import Row

BITS = "bits per byte"


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldOutBytes:
    """Settings of `HeldOut`: what to read.

    Args:
        shards: a folder of shards with a token per byte; None = that of the checkpoint's configuration.
        length: targets of a window.
        max_samples: most windows; None = all.
        batch_size: windows read together.
    """

    shards: str | None = None
    length: int = 2048
    max_samples: int | None = 2048
    batch_size: int = 8

    def __post_init__(self) -> None:
        for name in ("length", "max_samples", "batch_size"):
            at_least(name, getattr(self, name), 1)

    @property
    def memorize(self) -> None:
        """The baseline only."""
        return None


class HeldOut(Evaluation[int]):
    """Bits per byte of a byte-level checkpoint on held-out documents, with the interval over windows.

    Args:
        loaded: the checkpoint.
        settings: what to read.

    Raises:
        FileNotFoundError, ValueError: no shards, shards or a checkpoint of another tokenizer than bytes, or
            fewer held-out tokens than a window has.
    """

    name = "held_out"
    given: HeldOutBytes

    def __init__(self, loaded: Loaded, settings: HeldOutBytes) -> None:
        folder = settings.shards or loaded.config.data.shards
        if folder is None:
            raise ValueError("the checkpoint names no data.shards; give --shards")
        corpus = open_corpus(folder)
        for what, tokenizer in ((f"shards {folder}", corpus.tokenizer), ("checkpoint", loaded.tokenizer)):
            if tokenizer.fingerprint != ByteTokenizer.fingerprint:
                raise ValueError(f"bits per byte are those of bytes: the {what} must hold a token per byte")
        self.tokens = corpus.valid
        starts = window_starts(len(self.tokens), settings.length, settings.max_samples)
        super().__init__(loaded, settings, [(str(start), start) for start in starts])
        self.at_once = settings.batch_size

    def settings(self) -> dict[str, Any]:
        """Also the SHA-256 of all tokens that are read: equal for two results on the same bytes."""
        digest = hashlib.sha256()
        for _, start in self.items:
            digest.update(self._window(start).tobytes())
        return {**super().settings(), "held_out_tokens": len(self.tokens), "sha256": digest.hexdigest()}

    @torch.no_grad()
    def score(self, items: Sequence[int]) -> list[Row]:
        """For every window the summed loss in nats and the number of bytes among its targets."""
        tokens = torch.from_numpy(np.stack([self._window(start) for start in items]))
        losses = read_losses(self.loaded.model, tokens.to(self.loaded.device)).double().sum(1)
        sizes = (tokens[:, 1:] != ByteTokenizer.eos_id).sum(1)
        return [{"nats": float(x), "bytes": int(n)} for x, n in zip(losses, sizes, strict=True)]

    def metrics(self, rows: Sequence[Row]) -> list[Metric]:
        """Bits per byte."""
        return [bits_per_byte([row["nats"] for row in rows], [row["bytes"] for row in rows])]

    def _window(self, start: int) -> npt.NDArray[np.int64]:
        """The tokens `[length + 1]` of a window."""
        return window(self.tokens, start, self.given.length)


def window(tokens: TokenArray | Tokens, start: int, length: int) -> npt.NDArray[np.int64]:
    """`length` targets and the token before them, `[length + 1]`."""
    found: npt.NDArray[np.int64] = tokens[start : start + length + 1].astype(np.int64)
    return found


def window_starts(count: int, length: int, most: int | None) -> list[int]:
    """Where windows of `length` targets begin, spread evenly over `count` tokens; none overlap.

    Raises:
        ValueError: fewer tokens than one window.
    """
    windows = count // (length + 1)
    if windows < 1:
        raise ValueError(f"length must be less than the {count} held-out tokens, got {length}")
    chosen = windows if most is None else min(most, windows)
    return [place * windows // chosen * (length + 1) for place in range(chosen)]


def bits_per_byte(nats: Sequence[float], sizes: Sequence[int]) -> Metric:
    """Summed nats over summed bytes, in bits, with the interval of a ratio over windows."""
    found = perplexity(BITS, nats, sizes, "baseline")
    low, high = (None if edge is None else math.log2(edge) for edge in (found.low, found.high))
    stderr = None if found.stderr is None else found.stderr / found.value / math.log(2)
    value = math.log2(found.value)
    return replace(found, task="held-out bytes", value=value, low=low, high=high, stderr=stderr)
