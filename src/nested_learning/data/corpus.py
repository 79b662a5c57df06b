"""Token arrays made from text files: training and validation parts, memory-mapped and cached by content.

Shapes: `train [N_train]` and `valid [N_valid]`, token ids. Every document ends with `eos_id`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nested_learning.data.config import DataConfig, TokenizerConfig
from nested_learning.data.files import COMPRESSIONS, TEXT_ENDINGS, find_files, no_file
from nested_learning.data.mixture import TokenMixture
from nested_learning.data.records import read_text
from nested_learning.data.shards import ShardFolder, TokenArray, Tokens
from nested_learning.data.tokenizer import Tokenizer, encode_document, load_tokenizer, train_tokenizer

DOCUMENT_SEPARATOR = "\n\f\n"
"""A line that holds only a form feed. It is rare in real text, so user files are not split by chance."""

BUNDLED = "bundled"
FORMAT_VERSION = 2
CHECKSUMS = "checksums.json"
NEAR = 1000
"""Characters that are searched for the end of a word before a text is cut inside one."""

_BOUNDARIES = (re.compile(r"\s+"), re.compile(r"\W+"))
_SEPARATOR = re.compile(r"\r?\n\f\r?\n")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Corpus:
    """Tokenized text in two disjoint parts, with what is needed to judge a loss on it.

    Args:
        train, valid: memory-mapped token ids, uint16 or uint32 by vocabulary size; from shards, a
            `TokenMixture`.
        tokenizer: made the tokens.
        unigram_entropy: nats per validation token under the unigrams of the training part. A model that uses
            any context must fall below it.
        bytes_per_token: UTF-8 bytes per validation token, end tokens included. loss / ln 2 / bytes_per_token
            is bits per byte.
        provenance: from files, the cache key, tokenizer fingerprint, validation fraction, and of each file
            its name and the size and SHA-256 of its text; from shards, their folder and settings. "sha256"
            holds all hashes of the training data.
    """

    train: TokenArray | Tokens
    valid: TokenArray | Tokens
    tokenizer: Tokenizer
    unigram_entropy: float
    bytes_per_token: float
    provenance: dict[str, Any]

    @property
    def fingerprint(self) -> str:
        """A hash that differs for different training data.

        It is made from the SHA-256 in `provenance`, or from the tokens if there is none.
        """
        if kept := self.provenance.get("sha256"):
            return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()
        digest = hashlib.sha256()
        for start in range(0, len(self.train), 1 << 20):
            digest.update(self.train[start : start + (1 << 20)].tobytes())
        return digest.hexdigest()


@dataclasses.dataclass(frozen=True, slots=True)
class _Source:
    path: Path
    sha256: str
    num_bytes: int
    text: str


def bundled_files() -> list[Path]:
    """The public-domain English texts in the package, sorted by name; see `data/text/README.md`."""
    folder = Path(str(resources.files("nested_learning.data"))) / "text"
    return sorted(folder.glob("*.txt"))


def text_files(
    names: Iterable[str | Path],
    where: str,
    log: Callable[[str], None],
    others: Sequence[str] = (),
) -> list[Path]:
    """The text files that several names stand for, in the order of the names.

    Args:
        names: files, folders and patterns, see `find_files`; "bundled" stands for the text of the package.
            In folders, files that end in `TEXT_ENDINGS` are taken.
        where: the field that holds the names, for errors.
        log: called with a line for every folder and pattern: what was taken and what was left out.
        others: more endings, such as ".jsonl".

    Raises:
        FileNotFoundError: a name stands for no file.
    """
    endings = [ending + compression for ending in (*TEXT_ENDINGS, *others) for compression in COMPRESSIONS]
    files: list[Path] = []
    for name in names:
        if str(name) == BUNDLED:
            files += bundled_files()
            continue
        try:
            found = find_files(name, endings)
            if not found.files:
                raise no_file("text", name, found)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{where}: {error}") from None
        if found.files != [Path(name).expanduser()]:
            log(f"{name}: {found.describe()}")
        files += found.files
    return files


def default_cache_dir() -> Path:
    """`$NESTED_LEARNING_CACHE`, or `~/.cache/nested_learning`."""
    chosen = os.environ.get("NESTED_LEARNING_CACHE")
    return Path(chosen) if chosen else Path.home() / ".cache" / "nested_learning"


def prepare_corpus(
    files: Sequence[str | Path],
    tokenizer: TokenizerConfig | Tokenizer,
    cache_dir: str | Path | None = None,
    valid_fraction: float = 0.05,
) -> Corpus:
    """Tokenize `files` once and open the result; later calls with the same content only open it.

    Several processes may call this at once: each builds in its own folder and the first rename wins.

    Args:
        files: UTF-8 text files, plain, gzip or zstd, in this order. Documents inside a file are split at
            `DOCUMENT_SEPARATOR`.
        tokenizer: a configuration, whose tokenizer is trained on the training part only or read from its
            `path`, or a ready tokenizer (from a checkpoint).
        cache_dir: None means `default_cache_dir()`. The key of a cache entry is file content, tokenizer and
            fraction; an entry that does not match its checksums is made anew, with a line on stderr.
        valid_fraction: share of the characters of every file, taken from its end (see `split_validation`).

    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: no file, or one that is empty, not UTF-8 or too short.
    """
    if not files:
        raise ValueError("files: an empty list; name at least one text file")
    if isinstance(tokenizer, TokenizerConfig) and tokenizer.path is not None:
        tokenizer = load_tokenizer(tokenizer.path)
    sources = [_read_source(Path(file)) for file in files]
    key = _cache_key(sources, tokenizer, valid_fraction)
    folder = Path(cache_dir or default_cache_dir()).expanduser() / "corpora" / key
    damaged = _damage(folder) if folder.is_dir() else None
    if damaged is not None:
        print(f"token cache {folder}: {damaged}; it is made anew", file=sys.stderr)
    if damaged is not None or not folder.is_dir():
        parts = [_split_source(source, valid_fraction) for source in sources]
        _build(folder, parts, tokenizer)
    ready = _stored_tokenizer(folder, tokenizer)
    provenance = {
        "key": key,
        "tokenizer": ready.fingerprint,
        "valid_fraction": valid_fraction,
        "files": [{"name": s.path.name, "bytes": s.num_bytes, "sha256": s.sha256} for s in sources],
        "sha256": [s.sha256 for s in sources],
    }
    return Corpus(
        train=np.load(folder / "train.npy", mmap_mode="r"),
        valid=np.load(folder / "valid.npy", mmap_mode="r"),
        tokenizer=ready,
        provenance=provenance,
        **json.loads((folder / "statistics.json").read_text(encoding="utf-8")),
    )


def load_corpus(
    config: DataConfig, say: Callable[[str], None] = print, own: Tokenizer | None = None
) -> Corpus:
    """The tokenized text of a run: of its shards if the configuration names any, else of its files.

    Args:
        config: the text and the tokenizer.
        say: gets a line for every folder and pattern; see `text_files`.
        own: a tokenizer to use instead of the configured one.

    Raises:
        ValueError: no files given, or one that cannot be used; shards of another tokenizer than `own`.
        FileNotFoundError: a file is not there, or the shards are not complete.
    """
    if config.shards is not None:
        corpus = open_corpus(config.shards)
        if own is not None and corpus.tokenizer.fingerprint != own.fingerprint:
            raise ValueError(
                f"data.shards = {config.shards} were made with another tokenizer than that of "
                "train.init_from; give their text as data.files, or make them with its tokenizer"
            )
        return corpus
    if not config.files:
        raise ValueError("data.files is empty: give text, as in data.files=[a.txt,b.txt], or data.shards")
    files = text_files(config.files, "data.files", say)
    tokenizer = config.tokenizer if own is None else own
    return prepare_corpus(files, tokenizer, config.cache_dir, config.valid_fraction)


def open_corpus(folder: str | Path) -> Corpus:
    """The corpus in a folder of shards: training tokens by source weight, validation tokens of all sources.

    `unigram_entropy` uses the unigrams of the training mixture.

    Raises:
        FileNotFoundError: the folder is not complete.
        ValueError: it holds no validation document.
    """
    shards = ShardFolder(folder)
    train, valid = shards.open("train"), shards.open("valid")
    if not valid:
        raise ValueError(f"{shards.path} holds no validation document; raise mixture.valid_share")
    sources = shards.manifest["sources"]
    counts = [source["splits"]["valid"] for source in sources.values()]
    held_out = TokenMixture(list(valid.values()))
    tokenizer = shards.tokenizer()
    return Corpus(
        train=TokenMixture(list(train.values()), [shards.weights[name] for name in train]),
        valid=held_out,
        tokenizer=tokenizer,
        unigram_entropy=_cross_entropy(shards.unigrams(), held_out),
        bytes_per_token=sum(c["bytes"] for c in counts) / sum(c["tokens"] for c in counts),
        provenance={
            "shards": str(shards.path),
            "settings": shards.manifest["settings"],
            "sha256": {name: s["splits"]["train"]["sha256"] for name, s in sources.items()},
        },
    )


def split_documents(text: str) -> list[str]:
    """The documents of a text, without those that hold only white space."""
    return [document for document in _SEPARATOR.split(text) if document.strip()]


def split_validation(text: str, fraction: float) -> tuple[str, str]:
    """Cut `text` in two: `train + valid == text`, `valid` is about the last `fraction` of its characters.

    The cut is moved forward to the end of the next run of white space, so that it breaks neither a word nor
    a document separator. Text without white space (Chinese, DNA, minified code) is cut after the next
    punctuation or, if there is none nearby, between two characters.

    Raises:
        ValueError: `fraction` does not lie between 0 and 1.
    """
    if not 0.0 < fraction < 1.0:
        raise ValueError(f"valid_fraction={fraction} must lie strictly between 0 and 1")
    target = round(len(text) * (1.0 - fraction))
    end = len(text.rstrip())  # only white space after it leaves nothing for validation
    for boundary in _BOUNDARIES:
        gap = boundary.search(text, target, min(target + NEAR, end))
        if gap and (whole := boundary.match(text, gap.start())) and whole.end() < end:
            return text[: whole.end()], text[whole.end() :]
    return text[:target], text[target:]


def unigram_entropy(train: TokenArray, valid: TokenArray, vocab_size: int) -> float:
    """Mean of `-ln p` over `valid [N]`, nats per token, with `p(v) = (count of v in train + 1) / (N + V)`."""
    counts = np.bincount(train, minlength=vocab_size) + 1
    log_p = np.log(counts / counts.sum())
    return float(-(np.bincount(valid, minlength=vocab_size) * log_p).sum() / len(valid))


def _cross_entropy(share: npt.NDArray[np.float64], tokens: Tokens) -> float:
    """Mean of `-ln share[v]` over `tokens [N]`; the least share is added to all, so that none is 0."""
    counts = np.zeros(len(share), np.int64)
    for start in range(0, len(tokens), 1 << 20):
        counts += np.bincount(tokens[start : start + (1 << 20)], minlength=len(share))
    smoothed = share + share[share > 0].min()
    return float(-(counts * np.log(smoothed / smoothed.sum())).sum() / len(tokens))


def _read_source(path: Path) -> _Source:
    text = read_text(path)
    if not split_documents(text):
        raise ValueError(f"text file {path} is empty")
    raw = text.encode("utf-8")
    return _Source(path, hashlib.sha256(raw).hexdigest(), len(raw), text)


def _split_source(source: _Source, fraction: float) -> tuple[list[str], list[str]]:
    train, valid = (split_documents(part) for part in split_validation(source.text, fraction))
    if not train or not valid:
        raise ValueError(f"text file {source.path} is too short to split with valid_fraction={fraction}")
    return train, valid


def _cache_key(sources: list[_Source], tokenizer: TokenizerConfig | Tokenizer, fraction: float) -> str:
    if isinstance(tokenizer, TokenizerConfig):
        tokenizer_identity: object = {"kind": tokenizer.kind, "vocab_size": tokenizer.vocab_size}
    else:
        tokenizer_identity = tokenizer.fingerprint
    identity = {
        "version": FORMAT_VERSION,
        "files": [source.sha256 for source in sources],
        "tokenizer": tokenizer_identity,
        "valid_fraction": fraction,
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]


def _build(
    folder: Path, parts: list[tuple[list[str], list[str]]], tokenizer: TokenizerConfig | Tokenizer
) -> None:
    """Write `folder` atomically: build it in a temporary folder, then rename."""
    train_documents = [document for train, _ in parts for document in train]
    valid_documents = [document for _, valid in parts for document in valid]
    ready = (
        train_tokenizer(tokenizer, train_documents) if isinstance(tokenizer, TokenizerConfig) else tokenizer
    )
    train = _encode_documents(train_documents, ready)
    valid = _encode_documents(valid_documents, ready)
    statistics = {
        "unigram_entropy": unigram_entropy(train, valid, ready.vocab_size),
        "bytes_per_token": sum(len(document.encode("utf-8")) for document in valid_documents) / len(valid),
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="building-") as scratch:
        draft = Path(scratch) / "corpus"
        draft.mkdir()
        np.save(draft / "train.npy", train)
        np.save(draft / "valid.npy", valid)
        (draft / "statistics.json").write_text(json.dumps(statistics), encoding="utf-8")
        model = ready.state().get("model")
        if isinstance(tokenizer, TokenizerConfig) and model is not None:
            (draft / "tokenizer.model").write_bytes(model)
        checksums = {file.name: file_sha256(file) for file in sorted(draft.iterdir())}
        (draft / CHECKSUMS).write_text(json.dumps(checksums), encoding="utf-8")
        if folder.is_dir() and _damage(folder) is not None:
            folder.rename(Path(scratch) / "damaged")
        try:
            draft.rename(folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process finished the same work first
                raise


def _damage(folder: Path) -> str | None:
    """What is wrong with a folder of the cache; None if every file matches its checksum."""
    try:
        checksums = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))
        wrong = [name for name, digest in checksums.items() if file_sha256(folder / name) != digest]
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (ValueError, AttributeError):
        return f"{CHECKSUMS} is damaged"
    return f"{wrong[0]} has another SHA-256 than when it was made" if wrong else None


def file_sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _encode_documents(documents: list[str], tokenizer: Tokenizer) -> TokenArray:
    """All documents concatenated, each followed by the end token: `[N]`."""
    return np.concatenate([encode_document(tokenizer, text) for text in documents])


def _stored_tokenizer(folder: Path, tokenizer: TokenizerConfig | Tokenizer) -> Tokenizer:
    if not isinstance(tokenizer, TokenizerConfig):
        return tokenizer
    if tokenizer.kind == "byte":
        return train_tokenizer(tokenizer, [])
    return load_tokenizer(folder / "tokenizer.model")
