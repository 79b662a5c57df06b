"""From raw sources to shards: read, filter, drop copies, split, tokenize, write; resumable and deterministic.

One process reads and writes in order; workers filter, hash and tokenize blocks of documents in between. The
shards depend only on the texts, the settings and the tokenizer, not on the number of workers nor on how often
the run was killed.
"""

from __future__ import annotations

import hashlib
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nested_learning.data.config import DedupConfig, MixtureConfig, SourceConfig
from nested_learning.data.corpus import file_sha256
from nested_learning.data.pipeline.dedup import BandKeys, UIntArray, document_digest
from nested_learning.data.pipeline.filters import rejection
from nested_learning.data.pipeline.parallel import ordered_map
from nested_learning.data.pipeline.sources import (
    Document,
    Place,
    Problem,
    SourceError,
    UnusableSourceError,
    list_source,
    read_source,
    source_bytes,
    source_files,
)
from nested_learning.data.pipeline.store import (
    ShardStore,
    SourceProgress,
    SplitCounts,
    check_settings,
    write_json,
)
from nested_learning.data.shards import (
    MANIFEST,
    SHARD_VERSION,
    TOKENIZER_FILE,
    TokenArray,
    read_manifest,
    shard_file,
)
from nested_learning.data.tokenizer import Tokenizer, encode_document, load_tokenizer, token_dtype
from nested_learning.extras import DISTRIBUTION
from nested_learning.progress import progress_bar

PROVENANCE = "provenance.json"
BLOCK_CHARS = 1 << 19
COMMIT_CHARS = 1 << 22

Log = Callable[[str], None]


class Block(NamedTuple):
    """Consecutive documents and problems of a source.

    Args:
        texts: the documents.
        problems: records in between that cannot be used.
        place: the position after them.
        consumed: bytes of the source read so far.
    """

    texts: list[str]
    problems: list[Problem]
    place: Place
    consumed: int


class MadeDocument(NamedTuple):
    """A document that passed the filter, to be written unless it is a copy.

    Args:
        tokens: `[N]`, with the end token.
        digest: of its text, see `document_digest`.
        keys: MinHash keys `[bands]`, or None if near copies are kept.
        num_chars, num_bytes: size of its text.
    """

    tokens: TokenArray
    digest: bytes
    keys: UIntArray | None
    num_chars: int
    num_bytes: int


class MadeBlock(NamedTuple):
    """A `Block` after filtering and tokenizing.

    Args:
        made: for each text the document, or the name of the rule that rejects it.
        problems, place, consumed: those of the block.
        chars: characters of all its texts.
    """

    made: list[MadeDocument | str]
    problems: list[Problem]
    place: Place
    consumed: int
    chars: int


@dataclass(kw_only=True, slots=True)
class ProcessingJob:
    """A mixture to process into shards.

    Args:
        mixture, tokenizer: decide the content of the shards; the other fields do not change it.
        folder: where shards go.
        workers: processes that tokenize; 0 = only this process.
        progress: show a progress bar.
        log: called with one line per event.
    """

    mixture: MixtureConfig
    tokenizer: Tokenizer
    folder: Path
    workers: int = 0
    progress: bool = True
    log: Log = print

    def settings(self) -> dict[str, Any]:
        """Everything that decides the content of the shards, as plain JSON values."""
        mixture = asdict(self.mixture)
        sources = {source["name"]: _plain(source) for source in mixture.pop("sources")}
        order = {"order": list(sources), "tokenizer": self.tokenizer.fingerprint, "version": SHARD_VERSION}
        return {**_plain(mixture), **{f"source {k}": v for k, v in sources.items()}, **order}


def process_mixture(job: ProcessingJob) -> dict[str, Any]:
    """Make the shards of a mixture in `job.folder`, and return their manifest.

    A run that was interrupted is resumed. After an error the folder is not complete, but keeps what was
    committed.

    Raises:
        SourceError, FileNotFoundError: a source cannot be read.
        UnusableSourceError: no record of a source is usable, or too many are not.
        DiskFullError: the disk is full.
        OtherSettingsError: the folder was begun with other settings.
    """
    if (done := _finished(job)) is not None:
        job.log(f"{job.folder} is complete already")
        return done
    dtype = token_dtype(job.tokenizer.vocab_size)
    settings = job.settings() | {"files": {s.name: _files(s) for s in job.mixture.sources}}
    store = ShardStore(job.folder, settings, dtype, job.mixture.shard_tokens)
    try:
        for source in job.mixture.sources:
            progress = store.sources.setdefault(source.name, SourceProgress())
            if progress.read:
                job.log(f"{source.name}: going on after record {progress.read}")
            elif source.kind != "hub":
                job.log(f"{source.name}: {list_source(source).describe()}")
            if not progress.done:
                _process_source(job, source, store, progress)
            job.log(f"{source.name}: {summary(progress)}")
        _write_tokenizer(job)
        manifest = _manifest(job, store)
        write_json(job.folder / PROVENANCE, _provenance(job, store))
        store.complete(manifest)
    finally:
        store.close()
    return manifest


def summary(progress: SourceProgress) -> str:
    """Records, documents and tokens of a source in one line."""
    kept = sum(counts.documents for counts in progress.splits.values())
    dropped = ", ".join(f"{reason} {count}" for reason, count in sorted(progress.dropped.items()))
    tokens = ", ".join(
        f"{name} {c.documents} documents, {c.tokens} tokens" for name, c in progress.splits.items()
    )
    return f"{progress.read} records, {kept} kept ({tokens}); dropped: {dropped or 'none'}"


def _process_source(
    job: ProcessingJob, source: SourceConfig, store: ShardStore, progress: SourceProgress
) -> None:
    state = (job.tokenizer.state(), source, job.mixture.dedup, job.mixture.seed)
    blocks = read_blocks(source, progress)
    total = source_bytes(source)
    bar = progress_bar(
        total=total,
        initial=progress.consumed,
        unit="B",
        unit_scale=True,
        desc=source.name,
        shown=job.progress,
    )
    pending, since = 0, time.monotonic()
    try:
        for block in ordered_map(make_documents, blocks, job.workers, _set_up, state):
            _write_block(job, source, store, block)
            bar.update(block.consumed - progress.consumed)
            progress.place, progress.consumed = block.place, block.consumed
            progress.seconds, since = progress.seconds + time.monotonic() - since, time.monotonic()
            tokens = sum(counts.tokens for counts in progress.splits.values())
            bar.set_postfix(records=progress.read, tokens=tokens, refresh=False)
            pending += block.chars
            if pending > COMMIT_CHARS:
                store.commit()
                pending = 0
    except SourceError:
        store.commit()  # blocks are written as a whole, so what was written can stay
        raise
    finally:
        bar.close()
    store.commit()
    progress.check(source)
    progress.done = True
    store.commit()


def read_blocks(source: SourceConfig, progress: SourceProgress) -> Iterator[Block]:
    """The unread rest of a source in blocks of about `BLOCK_CHARS` characters; documents stay whole."""
    left = None if source.limit is None else source.limit - progress.read
    texts: list[str] = []
    problems: list[Problem] = []
    size, place, consumed = 0, progress.place, progress.consumed
    for item in read_source(source, progress.place) if left is None or left > 0 else ():
        place, consumed = item.place, item.consumed
        if isinstance(item, Document):
            texts.append(item.text)
            size += len(item.text)
        else:
            problems.append(item)
        count = len(texts) + len(problems)
        last = left is not None and count >= left
        if size >= BLOCK_CHARS or count >= BLOCK_CHARS // 64 or last:
            yield Block(texts, problems, place, consumed)
            left = None if left is None else left - count
            texts, problems, size = [], [], 0
        if last:
            return
    if texts or problems:
        yield Block(texts, problems, place, consumed)


class _Worker:
    """Settings of `make_documents`, set once per process."""

    tokenizer: Tokenizer
    source: SourceConfig
    band_keys: BandKeys | None


def _set_up(state: dict[str, Any], source: SourceConfig, dedup: DedupConfig, seed: int) -> None:
    _Worker.tokenizer = load_tokenizer(state)
    _Worker.source = source
    _Worker.band_keys = BandKeys(dedup, seed) if dedup.near else None


def make_documents(block: Block) -> MadeBlock:
    """Filter, hash and tokenize the texts of a block. `_set_up` must have run in the same process."""
    made = [_make(text) for text in block.texts]
    return MadeBlock(made, block.problems, block.place, block.consumed, sum(map(len, block.texts)))


def _make(text: str) -> MadeDocument | str:
    rules = _Worker.source.filter
    if rules is not None and (reason := rejection(text, rules)) is not None:
        return reason
    return MadeDocument(
        encode_document(_Worker.tokenizer, text),
        document_digest(text),
        None if _Worker.band_keys is None else _Worker.band_keys(text),
        len(text),
        len(text.encode("utf-8")),
    )


def _write_block(job: ProcessingJob, source: SourceConfig, store: ShardStore, block: MadeBlock) -> None:
    progress = store.sources[source.name]
    progress.read += len(block.made)
    for problem in block.problems:
        if progress.add_problem(problem):
            job.log(
                f"{source.name}: {problem.kind}: {problem.message} (others of this kind are counted only)"
            )
    for document in block.made:
        if isinstance(document, str):
            progress.drop(document)
        elif (reason := _copy_of(document, store, job.mixture.dedup)) is not None:
            progress.drop(reason)
        else:
            split = split_of(document.digest, document.num_chars, job.mixture)
            store.append(source.name, split, document.tokens, document.digest, document.num_bytes)
            store.exact.add(_digest_key(document.digest))
            if document.keys is not None:
                store.append_keys(document.keys)


def _copy_of(document: MadeDocument, store: ShardStore, dedup: DedupConfig) -> str | None:
    if dedup.exact and store.exact.contains_any(_digest_key(document.digest)):
        return "exact_copy"
    if document.keys is not None and store.near.contains_any(document.keys):
        return "near_copy"
    return None


def _digest_key(digest: bytes) -> UIntArray:
    return np.frombuffer(digest[:8], "<u8")


def split_of(digest: bytes, num_chars: int, mixture: MixtureConfig) -> str:
    """The split of a document, chosen by its hash, so that copies of a text always fall into the same one."""
    salted = hashlib.blake2b(digest, digest_size=8, key=str(mixture.seed).encode()).digest()
    draw = int.from_bytes(salted, "little") / 2**64
    long_share = mixture.long_share if num_chars >= mixture.long_chars else 0.0
    if draw < long_share:
        return "long"
    return "valid" if draw < long_share + mixture.valid_share else "train"


def _files(source: SourceConfig) -> list[list[Any]]:
    """Name and size of each file of a local source: a run must not be resumed with other files."""
    if source.kind == "hub":
        return []
    return [[file.name, file.stat().st_size] for file in source_files(source)]


def _finished(job: ProcessingJob) -> dict[str, Any] | None:
    file = job.folder / MANIFEST
    if not file.is_file():
        return None
    manifest = read_manifest(file)
    check_settings(manifest["settings"], job.settings(), job.folder)
    return manifest


def _write_tokenizer(job: ProcessingJob) -> None:
    model = job.tokenizer.state().get("model")
    if model is not None:
        (job.folder / TOKENIZER_FILE).write_bytes(model)


def _manifest(job: ProcessingJob, store: ShardStore) -> dict[str, Any]:
    """The content of `mixture.json`, which is equal for two runs with equal settings."""
    sources: dict[str, Any] = {}
    for source in job.mixture.sources:
        progress = store.sources[source.name]
        folder = job.folder / source.name
        splits = {name: _split_entry(job, folder, name, counts) for name, counts in progress.splits.items()}
        sources[source.name] = {
            "weight": source.weight,
            "records": progress.read,
            "dropped": progress.dropped,
            "examples": progress.examples,
            "splits": splits,
        }
        if not splits["train"]["tokens"]:
            raise UnusableSourceError(
                f"source {source.name}: no document is left for training; dropped: "
                f"{progress.dropped or 'none, nothing was read'}"
            )
        _write_unigrams(job, folder, splits["train"]["shards"])
    return {
        "version": SHARD_VERSION,
        "dtype": token_dtype(job.tokenizer.vocab_size).str,
        "shard_tokens": job.mixture.shard_tokens,
        "tokenizer": {
            "fingerprint": job.tokenizer.fingerprint,
            "vocab_size": job.tokenizer.vocab_size,
            "eos_id": job.tokenizer.eos_id,
        },
        "settings": job.settings(),
        "sources": sources,
    }


def _split_entry(job: ProcessingJob, folder: Path, split: str, counts: SplitCounts) -> dict[str, Any]:
    full, rest = divmod(counts.tokens, job.mixture.shard_tokens)
    sizes = [job.mixture.shard_tokens] * full + ([rest] if rest else [])
    files = [shard_file(folder, split, number) for number in range(len(sizes))]
    if sizes:
        files += [folder / f"{split}.starts", folder / f"{split}.hashes"]
    return {
        "tokens": counts.tokens,
        "documents": counts.documents,
        "bytes": counts.bytes,
        "shards": sizes,
        "sha256": {file.name: file_sha256(file) for file in files},
    }


def _write_unigrams(job: ProcessingJob, folder: Path, sizes: list[int]) -> None:
    """Counts of every token in the training split, `[V]` int64."""
    size = job.tokenizer.vocab_size
    counts = np.zeros(size, np.int64)
    for number in range(len(sizes)):
        shard = np.memmap(shard_file(folder, "train", number), token_dtype(size), "r")
        for start in range(0, len(shard), 1 << 20):
            counts += np.bincount(shard[start : start + (1 << 20)], minlength=size)
    if sizes:
        np.save(folder / "unigrams.npy", counts)


def _provenance(job: ProcessingJob, store: ShardStore) -> dict[str, Any]:
    """Where and when the shards were made, for people; no code reads it."""
    packages = (DISTRIBUTION, "sentencepiece", "datasketch", "numpy")
    return {
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "workers": job.workers,
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in packages},
        "settings": job.settings(),
        "sources": {name: progress.to_dict() for name, progress in store.sources.items()},
        "files": {
            source.name: {str(file): file_sha256(file) for file in source_files(source)}
            for source in job.mixture.sources
            if source.kind != "hub"
        },
    }


def _plain(value: Any) -> Any:
    """`value` with lists instead of tuples, as JSON returns it."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
