"""Token shards on disk, read as one long memory-mapped array that knows where documents start.

A folder of shards holds `mixture.json` (the last file written: without it the folder is not complete),
`tokenizer.model` unless tokens are bytes, and a folder for every source with, for each split in `SPLITS`,
    SPLIT-00000.bin …   token ids, little-endian, `shard_tokens` in each but the last
    SPLIT.starts        uint64, where each document starts, in tokens of the split
    SPLIT.hashes        16 bytes per document, `pipeline.dedup.document_digest`
Every document ends with the end token; a document may span several shards.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nested_learning.checks import one_of
from nested_learning.data.records import read_json
from nested_learning.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer

TokenArray = npt.NDArray[np.unsignedinteger[Any]]

SPLITS = ("train", "valid", "long")
MANIFEST = "mixture.json"
TOKENIZER_FILE = "tokenizer.model"
SHARD_VERSION = 1
DIGEST_BYTES = 16  # of the hash of a document


class Tokens:
    """Arrays that are read as if they were concatenated: `len(tokens)` and `tokens[a:b]`.

    A slice is copied only where it spans several arrays.

    Args:
        parts: the arrays, perhaps none.
    """

    def __init__(self, parts: Sequence[TokenArray | Tokens]) -> None:
        self._parts = list(parts)
        self._ends = list(accumulate(len(part) for part in self._parts))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, item: slice) -> TokenArray:
        """Tokens `[stop - start]`.

        Raises:
            ValueError: a slice with a step.
        """
        start, stop, step = item.indices(len(self))
        if step != 1:
            raise ValueError(f"tokens can be sliced with step 1 only, got {step}")
        found, number = [], bisect_right(self._ends, start)
        while start < stop:
            before = self._ends[number - 1] if number else 0
            end = min(stop, self._ends[number])
            found.append(self._parts[number][start - before : end - before])
            start, number = end, number + 1
        return found[0] if len(found) == 1 else np.concatenate(found or [np.zeros(0, np.uint16)])


class ShardSet(Tokens):
    """The shards of one split of one source.

    `starts [documents]` uint64 and `hashes [documents, 16]` uint8 are memory-mapped too.

    Args:
        folder: of the source.
        split: one of `SPLITS`.
        dtype: of the tokens, such as "<u2".
        shard_sizes: tokens of each shard.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file has another size than expected.
    """

    def __init__(self, folder: Path, split: str, dtype: str, shard_sizes: Sequence[int]) -> None:
        self._arguments = (folder, split, dtype, list(shard_sizes))
        files = [shard_file(folder, split, number) for number in range(len(shard_sizes))]
        super().__init__([_map(f, dtype, size) for f, size in zip(files, shard_sizes, strict=True)])
        self.starts = _map(folder / f"{split}.starts", "<u8", None)
        hashes = _map(folder / f"{split}.hashes", "u1", DIGEST_BYTES * len(self.starts))
        self.hashes = hashes.reshape(-1, DIGEST_BYTES)

    def __reduce__(self) -> tuple[Any, ...]:
        return ShardSet, self._arguments  # other processes map the files themselves


class ShardFolder:
    """A complete folder of shards, with its `manifest` and the `weights` of its sources by name.

    Args:
        path: of the folder.

    Raises:
        FileNotFoundError: there is no complete folder.
        ValueError: its manifest is damaged or of another version.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        file = self.path / MANIFEST
        if not file.is_file():
            raise FileNotFoundError(
                f"no complete shards in {self.path} ({MANIFEST} is missing); make them with "
                "scripts/data/process_mixture.py"
            )
        self.manifest = read_manifest(file)
        self.weights = {name: float(entry["weight"]) for name, entry in self.manifest["sources"].items()}

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the shards were made with.

        Raises:
            ValueError: its file was replaced.
        """
        wanted = self.manifest["tokenizer"]["fingerprint"]
        if wanted == ByteTokenizer.fingerprint:
            return ByteTokenizer()
        tokenizer = load_tokenizer(self.path / TOKENIZER_FILE)
        if tokenizer.fingerprint != wanted:
            raise ValueError(f"{self.path / TOKENIZER_FILE} is not the tokenizer of these shards, {wanted}")
        return tokenizer

    def open(self, split: str) -> dict[str, ShardSet]:
        """The tokens of a split by source name. Sources without tokens are left out.

        Raises:
            ValueError: an unknown split.
        """
        one_of("split", split, SPLITS)
        found = {}
        for name, entry in self.manifest["sources"].items():
            sizes = entry["splits"][split]["shards"]
            if sizes:
                found[name] = ShardSet(self.path / name, split, self.manifest["dtype"], sizes)
        return found

    def unigrams(self) -> npt.NDArray[np.float64]:
        """The share of each token in training batches `[V]`, summing to 1: counts weighted by source.

        Raises:
            ValueError: a file of counts is damaged.
        """
        share: npt.NDArray[np.float64] = np.zeros(self.manifest["tokenizer"]["vocab_size"])
        for name in self.open("train"):
            file = self.path / name / "unigrams.npy"
            try:
                counts = np.load(file)
            except (ValueError, EOFError) as error:
                raise ValueError(f"{file} is damaged: {error}") from None
            share += self.weights[name] * counts / counts.sum()
        share /= share.sum()
        return share


def read_manifest(file: Path) -> dict[str, Any]:
    """Read a `mixture.json`.

    Raises:
        ValueError: it is damaged or of another version.
    """
    manifest = read_json(file)
    version = manifest.get("version") if isinstance(manifest, dict) else None
    if version != SHARD_VERSION:
        raise ValueError(f"{file} has version {version!r}, this code reads {SHARD_VERSION}")
    try:
        whole = _describes_shards(manifest)
    except (KeyError, TypeError, ValueError, AttributeError):
        whole = False
    if not whole:
        raise ValueError(f"{file} is damaged: it does not describe shards as they are made; make them anew")
    return dict(manifest)


def _describes_shards(manifest: dict[str, Any]) -> bool:
    """Whether names and types are those of a manifest. The name of a source must be that of a subfolder."""
    np.dtype(manifest["dtype"])
    sources = manifest["sources"]
    sizes = [n for s in sources.values() for split in SPLITS for n in s["splits"][split]["shards"]]
    return (
        isinstance(manifest["settings"], dict)
        and isinstance(manifest["tokenizer"]["vocab_size"], int)
        and all(float(source["weight"]) > 0 for source in sources.values())
        and all(isinstance(size, int) for size in sizes)
        and all(re.fullmatch(r"[\w-]+", name) for name in sources)
    )


def shard_file(folder: Path, split: str, number: int) -> Path:
    """The path of shard `number` of a split."""
    return folder / f"{split}-{number:05d}.bin"


def _map(file: Path, dtype: str, size: int | None) -> npt.NDArray[Any]:
    if not file.is_file():
        raise FileNotFoundError(f"shard file {file} is missing")
    found = file.stat().st_size // np.dtype(dtype).itemsize
    if size is not None and found != size:
        raise ValueError(f"shard file {file} has {found} entries, {MANIFEST} says {size}")
    return np.memmap(file, dtype, "r") if found else np.zeros(0, dtype)
