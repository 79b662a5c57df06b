"""How well a tokenizer fits texts, and whether decoding returns them unchanged."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from nested_learning.data.pipeline.sampling import SourceSample
from nested_learning.data.tokenizer import Tokenizer, encode_document
from nested_learning.report import markdown_table

AWKWARD = (
    "  two  spaces, a\ttab and\n\n\nempty lines\r\n ",
    "naïve façade, ﬁ ligature, Å and Å, ½",
    "漢字かな العربية עברית हिन्दी ไทย",
    "🐋👩‍👩‍👧 \u200b\x00\x7f",
    "</s> <unk> <0x0A> [PAD]",
    "def f(x):\n    return x  # 4 spaces\n",
    "",
)
"""Texts that many tokenizers do not reproduce."""


@dataclass(kw_only=True, slots=True)
class Coverage:
    """Statistics of a tokenizer on some texts.

    Args:
        documents, bytes, tokens: their numbers; bytes are those of UTF-8.
        fertility: tokens per word (a run without white space).
        bytes_per_token: UTF-8 bytes per token.
        unknown: share of tokens that stand for lost text.
        byte_share: share of tokens that are single bytes.
        used: share of the vocabulary that occurs.
        lossless: whether decoding returned every text unchanged.
    """

    documents: int
    bytes: int
    tokens: int
    fertility: float
    bytes_per_token: float
    unknown: float
    byte_share: float
    used: float
    lossless: bool


def coverage(tokenizer: Tokenizer, texts: Iterable[str]) -> Coverage:
    """The coverage of `texts`.

    Raises:
        ValueError: they hold no token.
    """
    counts = np.zeros(tokenizer.vocab_size, np.int64)
    documents = words = size = 0
    lossless = True
    for text in texts:
        ids = encode_document(tokenizer, text)[:-1]
        counts += np.bincount(ids, minlength=len(counts))
        documents, words = documents + 1, words + len(text.split())
        size += len(text.encode("utf-8"))
        lossless = lossless and tokenizer.decode(ids.tolist()) == text
    tokens = int(counts.sum())
    if not tokens:
        raise ValueError("texts: nothing to measure a tokenizer on")
    return Coverage(
        documents=documents,
        bytes=size,
        tokens=tokens,
        fertility=tokens / max(1, words),
        bytes_per_token=size / tokens,
        unknown=float(counts[sorted(tokenizer.unknown_ids)].sum() / tokens),
        byte_share=float(counts[sorted(tokenizer.byte_ids)].sum() / tokens),
        used=float((counts > 0).mean()),
        lossless=lossless,
    )


def coverage_by_source(tokenizer: Tokenizer, samples: Mapping[str, SourceSample]) -> dict[str, Coverage]:
    """The coverage of each source's held-out documents, or of those it was trained on if none are held out.

    Sources without any text are left out.
    """
    parts = {name: sample.held_out or sample.training for name, sample in samples.items()}
    return {name: coverage(tokenizer, part) for name, part in parts.items() if any(part)}


def altered_texts(tokenizer: Tokenizer, texts: Iterable[str] = AWKWARD) -> list[tuple[str, str]]:
    """The texts that encoding and decoding changes, each with the result."""
    back = ((text, tokenizer.decode(tokenizer.encode(text))) for text in texts)
    return [(text, other) for text, other in back if text != other]


def coverage_table(rows: Mapping[str, Coverage]) -> str:
    """A Markdown table, a row for each entry of `rows`."""
    header = ["source", "documents", "MB", "tokens/word", "bytes/token", "unknown", "byte tokens"]
    return markdown_table(
        [*header, "vocabulary used", "lossless"],
        [[name, *_cells(of_source)] for name, of_source in rows.items()],
    )


def _cells(c: Coverage) -> list[str]:
    numbers = [f"{c.fertility:.3f}", f"{c.bytes_per_token:.3f}", f"{c.unknown:.5f}", f"{c.byte_share:.4f}"]
    size = [str(c.documents), f"{c.bytes / 1e6:.2f}"]
    return [*size, *numbers, f"{c.used:.3f}", "yes" if c.lossless else "NO"]
