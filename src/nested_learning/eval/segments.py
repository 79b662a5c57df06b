"""Texts in the order in which a model learned them, such as configs/data/continual_segments_sample.yaml."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from torch import Tensor

from nested_learning.data.corpus import bundled_files, open_corpus, prepare_corpus, text_files
from nested_learning.data.loader import sequential_batches
from nested_learning.data.tokenizer import Tokenizer

BUNDLED = "bundled:"


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """A text of the test, which a checkpoint has or has not learned.

    Args:
        name: unique.
        files: text files, folders or patterns, of which the last part is held out; "bundled:NAME" is a text
            of this package.
        shards: instead of files, a folder made by `scripts/data/process_mixture.py`.
    """

    name: str
    files: tuple[str, ...] = ()
    shards: str | None = None

    def __post_init__(self) -> None:
        if bool(self.files) == bool(self.shards):
            raise ValueError(f"segments.{self.name} must have either files or shards")

    def tokens(self, tokenizer: Tokenizer, valid_fraction: float) -> Any:
        """Held-out tokens.

        Raises:
            FileNotFoundError: no such file or folder.
            ValueError: shards of another tokenizer.
        """
        if self.shards is None:
            files = [path for file in self.files for path in self._located(file)]
            return prepare_corpus(files, tokenizer, None, valid_fraction).valid
        corpus = open_corpus(self.shards)
        if corpus.tokenizer.fingerprint != tokenizer.fingerprint:
            raise ValueError(f"segments.{self.name}: {self.shards} was tokenized for another model")
        return corpus.valid

    def _located(self, file: str) -> list[Path]:
        if file.startswith(BUNDLED):
            return [locate(file)]
        return text_files([file], f"segments.{self.name}.files", print)


def locate(file: str) -> Path:
    """The path of a bundled text, given as "bundled:NAME"."""
    names = {path.name: path for path in bundled_files()}
    name = file.removeprefix(BUNDLED)
    if name not in names:
        raise FileNotFoundError(f"bundled text must be one of {', '.join(names)}, got {name!r}")
    return names[name]


@dataclass(frozen=True, kw_only=True, slots=True)
class Segments:
    """Content of a segments file: `segments`, in the order of learning, and the share that is held out."""

    segments: tuple[Segment, ...]
    valid_fraction: float = 0.05

    @classmethod
    def read(cls, path: Path) -> Segments:
        """Read a YAML file such as `configs/data/continual_segments_sample.yaml`.

        Raises:
            FileNotFoundError: no such file.
            ValueError: no segments, two with one name, or an unknown key.
        """
        content = OmegaConf.to_container(OmegaConf.load(path))
        try:
            entries = [Segment(**_with_tuple(entry)) for entry in content.pop("segments")]  # type: ignore[union-attr, arg-type]
            made = cls(segments=tuple(entries), **content)  # type: ignore[arg-type]
        except (TypeError, KeyError) as error:
            raise ValueError(f"{path} must hold segments with name and files or shards: {error}") from None
        names = [segment.name for segment in made.segments]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"{path} must hold segments of different names, got {names}")
        return made

    @classmethod
    def named(cls, pairs: Sequence[str], valid_fraction: float) -> Segments:
        """Segments of one file, folder or pattern each, given as "NAME=FILE".

        Raises:
            ValueError: a pair without name or file, or two of one name.
        """
        parts = [pair.partition("=") for pair in pairs]
        if wrong := [pair for pair, (name, _, file) in zip(pairs, parts, strict=True) if not (name and file)]:
            raise ValueError(f"texts must be given as NAME=FILE, got {wrong[0]!r}")
        names = [name for name, _, _ in parts]
        if len(set(names)) < len(names):
            raise ValueError(f"texts must have different names, got {names}")
        entries = tuple(Segment(name=name, files=(file,)) for name, _, file in parts)
        return cls(segments=entries, valid_fraction=valid_fraction)


def _with_tuple(entry: dict[str, Any]) -> dict[str, Any]:
    return {**entry, "files": tuple(entry.get("files", ()))}


@dataclass(frozen=True, kw_only=True, slots=True)
class Windows:
    """Which tokens of a segment are scored.

    Args:
        seq_len: tokens of a window; None = as in the training of the first checkpoint.
        batch_size: windows that are read together.
        max_batches: most batches per segment, spread over its text.
    """

    seq_len: int | None = None
    batch_size: int = 4
    max_batches: int = 10

    def batches(self, segments: Segments, tokenizer: Tokenizer) -> list[list[Tensor]]:
        """Batches `[B, seq_len + 1]` of held-out tokens of every segment. `seq_len` must not be None."""
        assert self.seq_len is not None
        return [
            list(
                sequential_batches(
                    segment.tokens(tokenizer, segments.valid_fraction),
                    self.seq_len,
                    self.batch_size,
                    self.max_batches,
                )
            )
            for segment in segments.segments
        ]
