"""The `data` section of a configuration: text, tokenizer, sources of a mixture, and the loader.

A file of `configs/data/` with a `mixture` is both the manifest that `nl data` reads and a `data=`
choice of a training run.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from nested_learning.checks import at_least, check_types, one_of, positive, within

SOURCE_KINDS = ("text", "jsonl", "parquet", "hub")
LANGUAGES = ("en",)
BYTE_VOCAB_SIZE = 257  # 256 bytes and the end of text


@dataclass(kw_only=True, slots=True)
class FilterConfig:
    """Which documents are kept. A rule that is None is off; shares lie in [0, 1].

    Args:
        min_chars, max_chars: length of a document in characters.
        language: "en" keeps documents in which at least `min_stop_words` of the words are among the most
            frequent English function words, which distinguishes English prose from other text.
        min_stop_words: that share. English prose has about 0.4, other languages and code below 0.1.
        max_symbols: share of characters that are neither letters, digits, white space nor common punctuation.
        max_duplicate_lines: share of the non-empty lines that repeat an earlier line.
        max_repeated_grams: share of the word 5-grams that repeat an earlier one.
        max_boilerplate: share of the lines with a phrase of web boilerplate (cookies, JavaScript, log-in).
    """

    min_chars: int = 200
    max_chars: int | None = None
    language: str | None = None
    min_stop_words: float = 0.1
    max_symbols: float | None = 0.1
    max_duplicate_lines: float | None = 0.3
    max_repeated_grams: float | None = 0.3
    max_boilerplate: float | None = 0.2

    def __post_init__(self) -> None:
        check_types(self, "filter")
        at_least("filter.min_chars", self.min_chars, 1)
        if self.max_chars is not None and self.max_chars < self.min_chars:
            raise ValueError(
                f"filter.max_chars must be at least min_chars = {self.min_chars}, got {self.max_chars}"
            )
        if self.language not in (None, *LANGUAGES):
            raise ValueError(f"filter.language must be en or null, got {self.language!r}")
        shares = "min_stop_words max_symbols max_duplicate_lines max_repeated_grams max_boilerplate"
        for name in shares.split():
            within(f"filter.{name}", getattr(self, name), "[0, 1]")


@dataclass(kw_only=True, slots=True)
class DedupConfig:
    """Which documents count as copies of an earlier one, over all sources in their order.

    Args:
        exact: drop a document whose text (ends stripped) was seen before.
        near: drop a document that shares a band of its MinHash signature with an earlier one (Broder, 1997).
            Two documents with Jaccard similarity s of their word 5-grams share one with probability
            `1 - (1 - s^rows)^bands`: 0.08 at s = 0.5, 0.77 at 0.75, 0.999 at 0.9 for the defaults.
        bands, rows: number of bands of a signature, and of hashes in a band.
    """

    exact: bool = True
    near: bool = True
    bands: int = 14
    rows: int = 8

    def __post_init__(self) -> None:
        check_types(self, "dedup")
        for name in ("bands", "rows"):
            at_least(f"dedup.{name}", getattr(self, name), 1)


@dataclass(kw_only=True, slots=True)
class SourceConfig:
    """One source of documents.

    Args:
        name: used in logs and as a folder; letters, digits, `_` and `-`.
        kind: "text" (UTF-8 files, documents separated by a line with a form feed), "jsonl", "parquet", or
            "hub" (a data set for Hugging Face `datasets`, streamed). Files may end in .gz or .zst.
        path: a file, a folder or a pattern such as `corpus/*.jsonl.gz`; "bundled" stands for the text that
            comes with the package; for "hub" the name of the data set, or of a builder such as "json".
        subset: for "hub", the configuration of the data set.
        data_files: for "hub", the files of a builder such as "json".
        split, fallback_split: for "hub", the split, and another to use if it does not exist.
        text: the field or column that holds the text; `meta.body` is the field body of the field meta.
        weight: share of the training windows, relative to the other sources.
        limit: records to read at most; None = all.
        filter: which documents are kept; None = all that are not empty.
    """

    name: str
    kind: str
    path: str
    subset: str | None = None
    data_files: str | None = None
    split: str = "train"
    fallback_split: str | None = None
    text: str = "text"
    weight: float = 1.0
    limit: int | None = None
    filter: FilterConfig | None = None

    def __post_init__(self) -> None:
        where = f"source {self.name}"
        check_types(self, where)
        if not re.fullmatch(r"[\w-]+", self.name):
            raise ValueError(f"{where}: name may hold letters, digits, _ and - only, got {self.name!r}")
        one_of(f"{where}: kind", self.kind, SOURCE_KINDS)
        positive(f"{where}: weight", self.weight)
        at_least(f"{where}: limit", self.limit, 1)


@dataclass(kw_only=True, slots=True)
class MixtureConfig:
    """A weighted mixture of sources and how it becomes shards.

    Args:
        sources: at least one; names differ.
        dedup: which documents are dropped as copies.
        seed: of the choice of held-out documents and of the MinHash functions.
        valid_share: share of the documents held out for validation, chosen by a hash of their text.
        long_share: share of the long documents that are also held out, to evaluate long contexts.
        long_chars: a document with at least this many characters is long.
        shard_tokens: tokens of a shard (the last one of a source may hold fewer).
    """

    sources: tuple[SourceConfig, ...]
    dedup: DedupConfig = field(default_factory=DedupConfig)
    seed: int = 0
    valid_share: float = 0.005
    long_share: float = 0.02
    long_chars: int = 40_000
    shard_tokens: int = 1 << 24

    def __post_init__(self) -> None:
        check_types(self, "data.mixture")
        if not self.sources:
            raise ValueError("data.mixture.sources is empty; give at least one source")
        names = [source.name for source in self.sources]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"data.mixture.sources: the name {sorted(twice)[0]!r} is used twice")
        for name in ("valid_share", "long_share"):
            within(f"data.mixture.{name}", getattr(self, name), "[0, 1]")
        if self.valid_share + self.long_share >= 1:
            raise ValueError(
                "data.mixture.valid_share + long_share must be below 1, "
                f"got {self.valid_share} + {self.long_share}"
            )
        for name in ("long_chars", "shard_tokens"):
            at_least(f"data.mixture.{name}", getattr(self, name), 1)


@dataclass(kw_only=True, slots=True)
class Stage:
    """A stage of a length curriculum.

    Args:
        until_step: the stage ends at this step.
        seq_len: tokens of its sequences.
    """

    until_step: int
    seq_len: int

    def __post_init__(self) -> None:
        check_types(self, "data.loader.curriculum")
        for name in ("until_step", "seq_len"):
            at_least(f"data.loader.curriculum.{name}", getattr(self, name), 1)


@dataclass(kw_only=True, slots=True)
class LoaderConfig:
    """How tokens become rows of a batch.

    Args:
        crossing: rows are windows over the stream of documents, with an end token between them. If false
            (needs shards, which know where documents start) a row holds tokens of only one document, and the
            rest is padding without a loss; long documents are cut into several rows.
        bucketing: with crossing=false, rows of similar length share a batch, and batches are trimmed to
            their longest row, which saves padding.
        packing: with crossing=false, several documents share a row, chosen by best fit. Memories restart and
            attention is masked where a document begins, at multiples of the model's chunks.
        workers: processes that read ahead; 0 = read in the training process.
        curriculum: stages of shorter sequences at the start of training. A batch keeps its number of
            tokens, since its rows are cut into shorter ones.
    """

    crossing: bool = True
    bucketing: bool = False
    packing: bool = False
    workers: int = 0
    curriculum: tuple[Stage, ...] = ()

    def __post_init__(self) -> None:
        check_types(self, "data.loader")
        at_least("data.loader.workers", self.workers, 0)
        if self.bucketing and self.crossing:
            raise ValueError(
                "data.loader.bucketing needs loader.crossing = false: otherwise no row has padding"
            )
        if self.packing and (self.crossing or self.bucketing):
            raise ValueError("data.loader.packing needs loader.crossing = false and loader.bucketing = false")
        if self.bucketing and self.curriculum:
            raise ValueError("data.loader.bucketing and loader.curriculum both change the length: use one")
        steps = [stage.until_step for stage in self.curriculum]
        if steps != sorted(set(steps)) or (steps and steps[0] < 1):
            raise ValueError(f"data.loader.curriculum: until_step must grow from 1 on, got {steps}")


@dataclass(kw_only=True, slots=True)
class TokenizerConfig:
    """The tokenizer of a run.

    Args:
        kind: "bpe" or "unigram" (SentencePiece, trained on the training text at first use) or "byte".
        vocab_size: number of tokens; 257 for "byte" (256 bytes and the end of text).
        path: a SentencePiece model to use instead of training one; `vocab_size` must be its size.
    """

    kind: str = "bpe"
    vocab_size: int = 1024
    path: str | None = None

    def __post_init__(self) -> None:
        check_types(self, "data.tokenizer")
        one_of("data.tokenizer.kind", self.kind, ("bpe", "unigram", "byte"))
        at_least("data.tokenizer.vocab_size", self.vocab_size, BYTE_VOCAB_SIZE)
        if self.kind == "byte" and self.vocab_size != BYTE_VOCAB_SIZE:
            raise ValueError(
                f"data.tokenizer.vocab_size must be {BYTE_VOCAB_SIZE} for data.tokenizer.kind = byte, "
                f"got {self.vocab_size}"
            )


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """Text, tokenizer and the part held out.

    Args:
        files: UTF-8 text files, folders of them or patterns such as `books/*.txt`; the word "bundled" stands
            for the text that comes with the package.
        tokenizer: how text becomes tokens.
        cache_dir: where tokenizers and token files are kept; None = `~/.cache/nested_learning`.
        valid_fraction: part of the text of `files` held out for validation, in (0, 1).
        shards: a folder made by `scripts/data/process_mixture.py`; it is used instead of `files`, with the
            tokenizer and the held-out documents in it.
        mixture: the sources of such shards; only the scripts in `scripts/data/` read it.
        loader: how tokens become rows of a batch.
    """

    files: tuple[str, ...] = ("bundled",)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    cache_dir: str | None = None
    valid_fraction: float = 0.05
    shards: str | None = None
    mixture: MixtureConfig | None = None
    loader: LoaderConfig = field(default_factory=LoaderConfig)

    def __post_init__(self) -> None:
        check_types(self, "data")
        within("data.valid_fraction", self.valid_fraction, "(0, 1)")
