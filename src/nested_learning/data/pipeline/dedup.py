"""Copies of documents: exact ones by hash, near ones by MinHash (Broder, 1997) and locality-sensitive bands.

Signatures come from `datasketch`. Its LSH index takes kilobytes per document, as much as the documents
themselves, so bands are kept here as sets of 64-bit keys, which take 8 to 20 bytes each.
"""

from __future__ import annotations

import hashlib
import re
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from nested_learning.data.config import DedupConfig
from nested_learning.data.shards import DIGEST_BYTES

UIntArray = npt.NDArray[np.unsignedinteger[Any]]

GRAM = 5
"""Words of a shingle."""

_WORD = re.compile(r"\w+")
_FACTOR = np.uint64(0x9E3779B97F4A7C15)
_BATCH = 4096


def document_digest(text: str) -> bytes:
    """The identity of a document: 16 bytes of BLAKE2b of its text without white space at the ends."""
    return hashlib.blake2b(text.strip().encode("utf-8"), digest_size=DIGEST_BYTES).digest()


def words_of(text: str) -> Iterator[str]:
    """The words of `text` in lower case, in order. An iterator, since a list takes many times the memory."""
    return (match[0] for match in _WORD.finditer(text.lower()))


def gram_hashes(words: Iterable[str]) -> UIntArray:
    """32-bit hashes `[max(1, N - 4)]` of the runs of five words.

    Fewer than five words are one run; no words give an empty array.
    """
    base = np.fromiter((zlib.crc32(word.encode()) for word in words), np.uint32)
    if not len(base):
        return base
    count, size = max(1, len(base) - GRAM + 1), min(GRAM, len(base))
    grams = np.zeros(count, np.uint32)
    for start in range(0, count, _BATCH):
        part = min(_BATCH, count - start)
        total = np.zeros(part, np.uint64)
        for i in range(start, start + size):  # a polynomial in an odd factor, modulo 2^64
            total = total * _FACTOR + base[i : i + part]
        grams[start : start + part] = (total * _FACTOR) >> np.uint64(32)
    return grams


class BandKeys:
    """Computes the band keys of a text; equal settings give equal keys in every process.

    Args:
        config: numbers of bands and of rows in a band.
        seed: of the hash functions.
    """

    def __init__(self, config: DedupConfig, seed: int) -> None:
        from datasketch import MinHash

        self._bands = config.bands
        self._empty = MinHash(num_perm=config.bands * config.rows, seed=seed, hashfunc=int, scheme="affine32")

    def signature(self, text: str) -> UIntArray:
        """MinHash signature `[bands * rows]`, uint32.

        The probability that two texts agree at a position is the Jaccard similarity of their sets of
        five-word runs.
        """
        sketch = self._empty.copy()
        grams = np.unique(gram_hashes(words_of(text)))
        for start in range(0, len(grams), _BATCH):  # datasketch takes memory for a whole batch times num_perm
            sketch.update_batch(grams[start : start + _BATCH].tolist())
        return np.asarray(sketch.hashvalues, dtype=np.uint32)

    def __call__(self, text: str) -> UIntArray:
        """Keys `[bands]` uint64, one for each band of the signature; equal bands at other places differ."""
        bands = self.signature(text).reshape(self._bands, -1)
        keys = [
            hashlib.blake2b(
                band.astype("<u4").tobytes(), digest_size=8, salt=i.to_bytes(2, "little")
            ).digest()
            for i, band in enumerate(bands)
        ]
        return np.frombuffer(b"".join(keys), dtype="<u8")


class KeySet:
    """A growing set of 64-bit keys: a sorted array, and a small set of the most recent ones."""

    def __init__(self) -> None:
        self._sorted: UIntArray = np.zeros(0, np.uint64)
        self._recent: set[int] = set()

    def __len__(self) -> int:
        return len(self._sorted) + len(self._recent)

    def contains_any(self, keys: UIntArray) -> bool:
        """Whether one of `keys [N]` uint64 is in the set."""
        if not self._recent.isdisjoint(keys.tolist()):
            return True
        if not len(self._sorted):
            return False
        found = np.searchsorted(self._sorted, keys).clip(max=len(self._sorted) - 1)
        return bool((self._sorted[found] == keys).any())

    def add(self, keys: UIntArray) -> None:
        """Add `keys [N]` uint64. The array is sorted again at most once per eighth of growth."""
        self._recent.update(keys.tolist())
        if len(self._recent) > max(1 << 15, len(self._sorted) // 8):
            recent = np.fromiter(self._recent, np.uint64, len(self._recent))
            self._sorted = np.union1d(self._sorted, recent)
            self._recent = set()
