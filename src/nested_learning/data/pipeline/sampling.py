"""A weighted sample of a mixture, to train and evaluate a tokenizer on."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterator
from dataclasses import dataclass, field

from nested_learning.data.config import MixtureConfig, SourceConfig
from nested_learning.data.pipeline.dedup import document_digest
from nested_learning.data.pipeline.filters import rejection
from nested_learning.data.pipeline.process import split_of
from nested_learning.data.pipeline.sources import Document, UnusableSourceError, read_source
from nested_learning.data.pipeline.tally import Tally
from nested_learning.progress import progress_bar

HUB_FACTOR = 4
"""A hub data set is read up to this many times the characters wanted from it; local files to their end."""

HELD_OUT_CHARS = 1_000_000


@dataclass(kw_only=True, slots=True)
class SourceSample:
    """The sample of one source.

    Args:
        wanted: characters that were asked for.
        training: documents for the tokenizer.
        held_out: some of the documents of the validation and long splits of the mixture, on which no
            tokenizer may be trained.
        problems: number of records that could not be used.
    """

    wanted: int
    training: list[str] = field(default_factory=list)
    held_out: list[str] = field(default_factory=list)
    problems: int = 0

    @property
    def chars(self) -> int:
        """Characters drawn for training."""
        return sum(map(len, self.training))


def sample_mixture(mixture: MixtureConfig, num_chars: int, progress: bool = True) -> dict[str, SourceSample]:
    """Draw about `num_chars` characters, divided by weight and chosen at random within each source.

    Only documents of the training split that pass the source's filter are drawn. A source with too little
    text contributes all of it. Only the sample is held in memory.

    Raises:
        ValueError: `num_chars` is below 1.
        SourceError, FileNotFoundError: a source cannot be read, or too little of it.
    """
    if num_chars < 1:
        raise ValueError(f"num_chars must be at least 1, got {num_chars}")
    total = sum(source.weight for source in mixture.sources)
    return {
        source.name: _sample_source(source, mixture, max(1, int(num_chars * source.weight / total)), progress)
        for source in mixture.sources
    }


def _sample_source(source: SourceConfig, mixture: MixtureConfig, wanted: int, progress: bool) -> SourceSample:
    sample = SourceSample(wanted=wanted)
    kept: list[tuple[int, int, str]] = []  # a heap with the largest priority first
    size, held = 0, 0
    for number, (text, digest) in enumerate(_usable(source, mixture, sample, progress)):
        if split_of(digest, len(text), mixture) != "train":
            if held < HELD_OUT_CHARS:
                sample.held_out.append(text[: HELD_OUT_CHARS - held])
                held += len(sample.held_out[-1])
            continue
        draw = hashlib.blake2b(
            digest + number.to_bytes(8, "little"), digest_size=8, key=str(mixture.seed).encode()
        ).digest()
        text = text[:wanted]
        heapq.heappush(kept, (-int.from_bytes(draw, "little"), number, text))
        size += len(text)
        while size - len(kept[0][2]) >= wanted:
            size -= len(heapq.heappop(kept)[2])
    if not kept and not sample.held_out:
        raise UnusableSourceError(f"source {source.name}: its filter leaves no document")
    sample.training = [text for _, _, text in sorted(kept, key=lambda entry: entry[1])]
    return sample


def _usable(
    source: SourceConfig, mixture: MixtureConfig, sample: SourceSample, progress: bool
) -> Iterator[tuple[str, bytes]]:
    """Texts that pass the filter, with their digests.

    Raises:
        UnusableSourceError: at the end, see `Tally`.
    """
    tally = Tally()
    most = HUB_FACTOR * sample.wanted if source.kind == "hub" else None
    seen = 0
    records = progress_bar(
        read_source(source),
        desc=f"sampling {source.name}",
        unit="doc",
        total=source.limit,
        shown=progress,
    )
    for number, item in enumerate(records):
        if (source.limit is not None and number >= source.limit) or (most is not None and seen >= most):
            break
        tally.add(item)
        if not isinstance(item, Document):
            sample.problems += 1
        elif source.filter is None or rejection(item.text, source.filter) is None:
            seen += len(item.text)
            yield item.text, document_digest(item.text)
    tally.check(source)
