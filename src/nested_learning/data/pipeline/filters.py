"""Rules that decide whether a document is kept. All count characters, words or lines.

The measures follow Gopher (Rae et al., 2021, appendix A) and C4 (Raffel et al., 2020); the thresholds are
`FilterConfig`'s.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from nested_learning.data.config import FilterConfig
from nested_learning.data.pipeline.dedup import gram_hashes, words_of

STOP_WORDS = frozenset(
    re.findall(
        r"\w+",
        "the of and to in a is that for it as was with be by on not he his but at are this have from or had "
        "an they which one you were all her she there would their we him been has when who will no more if "
        "out so up said what its about than into them can only other time new some could these two may first "
        "then do any",
    )
)
BOILERPLATE = (
    "cookie",
    "javascript",
    "lorem ipsum",
    "all rights reserved",
    "terms of use",
    "terms of service",
    "privacy policy",
    "sign up",
    "log in",
    "subscribe",
    "newsletter",
    "click here",
    "powered by",
    "follow us",
    "add to cart",
    "share this",
)
_PROSE = re.compile(r"[\w\s.,;:!?'\"()\-\u2013\u2014\u2018\u2019\u201c\u201d\u2026]+")


def rejection(text: str, rules: FilterConfig) -> str | None:
    """The name of the first rule that rejects `text`, None if it is kept. Cheap rules come first."""
    if len(text) < rules.min_chars:
        return "too_short"
    if rules.max_chars is not None and len(text) > rules.max_chars:
        return "too_long"
    measures: tuple[tuple[str, float | None, Callable[[str], float]], ...] = (
        ("symbols", rules.max_symbols, symbol_share),
        ("duplicate_lines", rules.max_duplicate_lines, duplicate_line_share),
        ("boilerplate", rules.max_boilerplate, boilerplate_share),
    )
    for name, limit, measure in measures:
        if limit is not None and measure(text) > limit:
            return name
    if rules.language is None and rules.max_repeated_grams is None:
        return None
    if rules.language == "en" and stop_word_share(words_of(text)) < rules.min_stop_words:
        return "language"
    most = rules.max_repeated_grams
    if most is not None and repeated_share(gram_hashes(words_of(text))) > most:
        return "repetition"
    return None


def symbol_share(text: str) -> float:
    """Share of characters that are neither letters, digits, white space nor punctuation of prose."""
    return len(_PROSE.sub("", text)) / len(text)


def duplicate_line_share(text: str) -> float:
    """Share of the non-empty lines that repeat an earlier line of the text."""
    hashes = np.fromiter(map(hash, _lines(text)), np.int64)
    return repeated_share(hashes)


def boilerplate_share(text: str) -> float:
    """Share of the non-empty lines that hold a phrase of web boilerplate."""
    lower = text.lower()
    present = [phrase for phrase in BOILERPLATE if phrase in lower]  # mostly none
    if not present:
        return 0.0
    found = np.fromiter((any(phrase in line for phrase in present) for line in _lines(lower)), np.bool_)
    return float(found.mean())


def stop_word_share(words: Iterable[str]) -> float:
    """Share of lower-case `words` that are among the most frequent English function words."""
    found = np.fromiter((word in STOP_WORDS for word in words), np.bool_)
    return float(found.mean()) if len(found) else 0.0


def repeated_share(hashes: npt.NDArray[np.integer[Any]]) -> float:
    """Share of `hashes [N]` that repeat an earlier one."""
    return 1 - len(np.unique(hashes)) / len(hashes) if len(hashes) else 0.0


def _lines(text: str) -> Iterator[str]:
    """The non-empty lines, stripped. An iterator, since a list of short lines takes many times the memory."""
    return (line for line in map(str.strip, io.StringIO(text, newline="\n")) if line)
