"""Checks of a mixture before it is processed, and of shards after it."""

from __future__ import annotations

from itertools import islice

import numpy as np

from nested_learning.data.config import MixtureConfig, SourceConfig
from nested_learning.data.corpus import file_sha256
from nested_learning.data.pipeline.sources import Document, list_source, read_source, source_bytes
from nested_learning.data.pipeline.tally import Tally
from nested_learning.data.shards import SPLITS, ShardFolder, ShardSet

LOOK = 100
"""Number of records of a source that are read to check it."""


def check_source(source: SourceConfig) -> str:
    """One line about a source, after reading its first records.

    Raises:
        FileNotFoundError: no file at the path.
        SourceError: the source, or too many of those records, cannot be read.
    """
    items = list(islice(read_source(source), LOOK))
    good = [item for item in items if isinstance(item, Document)]
    tally = Tally()
    for item in items:
        tally.add(item)
    tally.check(source)
    mean = sum(len(item.text) for item in good) / len(good)
    size = source_bytes(source)
    where = "streamed" if size is None else f"{list_source(source).describe()}; {size / 1e6:.1f} MB"
    return f"{where}; {len(good)} of the first {len(items)} records usable, {mean:.0f} characters on average"


def check_mixture(mixture: MixtureConfig) -> tuple[list[str], list[str]]:
    """A line about every source, and the problems: an empty list if all can be read."""
    total = sum(source.weight for source in mixture.sources)
    lines, problems = [], []
    for source in mixture.sources:
        try:
            line = check_source(source)
        except (ValueError, FileNotFoundError) as error:
            problems.append(str(error))
            line = "cannot be used"
        lines.append(f"{source.name}: weight {source.weight / total:.4f}, {source.kind}: {line}")
    return lines, problems


def check_shards(folder: ShardFolder) -> list[str]:
    """The problems of shards in files, checksums, tokens, document boundaries and overlap of splits."""
    problems = []
    for name, entry in folder.manifest["sources"].items():
        for split in SPLITS:
            for file, digest in entry["splits"][split]["sha256"].items():
                path = folder.path / name / file
                if not path.is_file():
                    problems.append(f"{path} is missing")
                elif file_sha256(path) != digest:
                    problems.append(f"{path} has another SHA-256 than when it was made")
    if problems:
        return problems
    sets = {(n, split): tokens for split in SPLITS for n, tokens in folder.open(split).items()}
    vocabulary, eos = (folder.manifest["tokenizer"][key] for key in ("vocab_size", "eos_id"))
    for (name, split), tokens in sets.items():
        problems += [f"{name} {split}: {text}" for text in _check_set(tokens, vocabulary, eos)]
    return problems + overlap(folder)


def overlap(folder: ShardFolder) -> list[str]:
    """The problem of documents that are in more than one split, found by their hashes over all sources."""
    digests = {
        split: {row.tobytes() for tokens in folder.open(split).values() for row in tokens.hashes}
        for split in ("valid", "long")
    }
    problems = []
    if both := digests["valid"] & digests["long"]:
        problems.append(f"{len(both)} documents are in the splits valid and long")
    for name, tokens in folder.open("train").items():
        for split, held_out in digests.items():
            if count := sum(row.tobytes() in held_out for row in tokens.hashes):
                problems.append(f"{count} training documents of {name} are in the split {split}")
    return problems


def _check_set(tokens: ShardSet, vocabulary: int, eos: int) -> list[str]:
    problems = []
    largest = max(int(tokens[start : start + (1 << 20)].max()) for start in range(0, len(tokens), 1 << 20))
    if largest >= vocabulary:
        problems.append(f"token {largest} is outside the vocabulary of {vocabulary}")
    ends = np.append(tokens.starts[1:], np.uint64(len(tokens))).astype(np.int64)
    if tokens.starts[0] != 0 or not (np.diff(ends, prepend=0) > 0).all():
        return [*problems, "document boundaries do not grow from 0"]
    last = np.concatenate([tokens[end - 1 : end] for end in ends.tolist()])
    if not (last == eos).all():
        problems.append(f"{int((last != eos).sum())} documents do not end with the end token {eos}")
    return problems
