"""Documents from text, jsonl and parquet files, plain, gzip or zstd, and from Hugging Face `datasets`.

Reading never stops at one bad record: readers yield a `Problem` in its place, which callers count. Every item
says where it ends, and reading can start again from there.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from nested_learning.data.config import SourceConfig
from nested_learning.data.corpus import bundled_files

SUFFIXES = {"text": (".txt", ".md", ".rst"), "jsonl": (".jsonl", ".json"), "parquet": (".parquet",)}
COMPRESSIONS = ("", ".gz", ".zst")


class SourceError(ValueError):
    """A source that cannot be read (further), and what to do about it."""


class CorruptFileError(Exception):
    """The rest of a file cannot be decoded."""


CORRUPT = (CorruptFileError, gzip.BadGzipFile, EOFError, zlib.error, OSError)


class Place(NamedTuple):
    """How far a source has been read: records of file number `file`, files before it being done."""

    file: int = 0
    record: int = 0


START = Place()


class Document(NamedTuple):
    """A text that is not empty, the place behind it, and how many bytes of the source were read so far."""

    text: str
    place: Place
    consumed: int


class Problem(NamedTuple):
    """A record (or the rest of a file) that cannot be used: its kind, for counting, and one sentence."""

    kind: str
    message: str
    place: Place
    consumed: int


Item = Document | Problem
Value = str | bytes | Problem
"""What a format's reader makes of one record; a `Problem` with any place, which `read_source` fills in."""


def source_files(source: SourceConfig) -> list[Path]:
    """The files of a local source, sorted by name. Raises FileNotFoundError if there is none."""
    if source.path == "bundled":
        return bundled_files()
    path = Path(source.path).expanduser()
    if path.is_dir():
        endings = tuple(s + c for s in SUFFIXES[source.kind] for c in COMPRESSIONS)
        files = [file for file in path.rglob("*") if file.name.endswith(endings)]
    elif path.is_file():
        files = [path]
    else:
        root = Path(path.anchor) if path.is_absolute() else Path()
        pattern = str(path.relative_to(path.anchor) if path.is_absolute() else path)
        files = [file for file in root.glob(pattern) if file.is_file()]
    if not files:
        raise FileNotFoundError(f"source {source.name}: no {source.kind} file at {source.path}")
    return sorted(files)


def source_bytes(source: SourceConfig) -> int | None:
    """Bytes on disk of a local source (compressed, if it is), None for a hub data set."""
    if source.kind == "hub":
        return None
    return sum(file.stat().st_size for file in source_files(source))


def read_source(source: SourceConfig, start: Place = START) -> Iterator[Item]:
    """The documents of `source` behind `start`, in a fixed order, problems in between.

    Raises:
        FileNotFoundError: no file at the path.
        SourceError: no record of a file has the text field, or a hub data set cannot be reached (any more).
    """
    if source.kind == "hub":
        yield from _read_hub(source, start)
        return
    read = {"text": _read_text, "jsonl": _read_jsonl, "parquet": _read_parquet}[source.kind]
    before = 0
    for number, file in enumerate(source_files(source)):
        if number >= start.file:
            yield from _read_file(read, source, file, Place(number, 0), start, before)
        before += file.stat().st_size


def _read_file(
    read: Callable[[Path, str], Iterator[tuple[Value, int]]],
    source: SourceConfig,
    file: Path,
    place: Place,
    start: Place,
    before: int,
) -> Iterator[Item]:
    """One file: number its records, decode them, turn what is wrong into problems."""
    number, record, without = place.file, 0, 0
    skip = start.record if start.file == number else 0
    consumed = before
    try:
        for value, position in read(file, source.text):
            record, consumed = record + 1, before + position
            if isinstance(value, Problem) and value.kind == "missing_text":
                without += 1
            if record > skip:
                yield _item(value, f"record {record} of {file}", Place(number, record), consumed)
    except CORRUPT as error:
        if isinstance(error, OSError) and error.errno is not None:  # the disk, not the content
            raise
        message = f"{file} is corrupt after record {record} ({error}); the rest of it is left out"
        yield Problem("corrupt_file", message, Place(number + 1, 0), consumed)
        return
    if record and without == record:
        raise SourceError(
            f"source {source.name}: no record of {file} has text in {source.text!r}; "
            "set `text` to the right field"
        )


def _item(value: Value, where: str, place: Place, consumed: int) -> Item:
    if isinstance(value, Problem):
        return Problem(value.kind, f"{where}: {value.message}", place, consumed)
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8")
        except UnicodeDecodeError as error:
            message = f"{where} is not UTF-8: bad byte at offset {error.start}"
            return Problem("bad_utf8", message, place, consumed)
    if not value.strip():
        return Problem("empty", f"{where} is empty", place, consumed)
    if not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):  # from "\ud800" in JSON
        return Problem("bad_utf8", f"{where} holds half of a surrogate pair", place, consumed)
    return Document(value, place, consumed)


def _problem(kind: str, message: str) -> Problem:
    return Problem(kind, message, START, 0)


@contextlib.contextmanager
def _open(path: Path) -> Iterator[tuple[BinaryIO, Callable[[], int]]]:
    """A decompressed stream, and a function that tells how far the file itself has been read."""
    if path.suffix == ".zst":
        import pyarrow as pa

        with pa.OSFile(str(path)) as raw, pa.CompressedInputStream(raw, "zstd") as stream:
            yield cast(BinaryIO, io.BufferedReader(stream, 1 << 20)), raw.tell
        return
    with path.open("rb") as file:
        if path.suffix == ".gz":
            with gzip.GzipFile(fileobj=file) as unzipped:
                yield cast(BinaryIO, io.BufferedReader(cast(Any, unzipped), 1 << 20)), file.tell
        else:
            yield file, file.tell


def _read_text(path: Path, field: str) -> Iterator[tuple[Value, int]]:
    """Documents end at a line that holds a form feed and nothing else."""
    lines: list[bytes] = []
    with _open(path) as (stream, tell):
        for line in stream:
            if line.rstrip(b"\r\n") == b"\f":
                yield b"".join(lines).removesuffix(b"\n"), tell()
                lines = []
            else:
                lines.append(line)
        if lines:
            yield b"".join(lines), tell()


def _read_jsonl(path: Path, field: str) -> Iterator[tuple[Value, int]]:
    with _open(path) as (stream, tell):
        for line in stream:
            if line.strip():
                yield _json_text(line, field), tell()


def _json_text(line: bytes, field: str) -> Value:
    try:
        record = json.loads(line)
    except UnicodeDecodeError as error:
        return _problem("bad_utf8", f"not UTF-8: bad byte at offset {error.start}")
    except (ValueError, RecursionError) as error:
        return _problem("bad_json", f"not JSON: {error}")
    text = record.get(field) if isinstance(record, dict) else None
    return text if isinstance(text, str) else _missing(field, record)


def _missing(field: str, record: object) -> Problem:
    has = ", ".join(map(str, list(record)[:10])) if isinstance(record, dict) else type(record).__name__
    return _problem("missing_text", f"no text in {field!r}; it has {has}")


def _read_parquet(path: Path, field: str) -> Iterator[tuple[Value, int]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            if field not in file.schema_arrow.names:
                names = ", ".join(file.schema_arrow.names)
                raise SourceError(
                    f"{path} has no column {field!r}; it has {names}; set `text` to the right one"
                )
            size, rows, done = path.stat().st_size, file.metadata.num_rows, 0
            for batch in file.iter_batches(batch_size=256, columns=[field]):
                for cell in batch.column(0).cast(pa.large_binary()):  # bytes: bad UTF-8 is ours to report
                    value, done = cell.as_py(), done + 1
                    yield (_missing(field, {}) if value is None else value), size * done // rows
    except pa.ArrowException as error:
        raise CorruptFileError(str(error)) from error


def _read_hub(source: SourceConfig, start: Place) -> Iterator[Item]:
    """Stream a data set; each record ends at `Place(0, its number)`."""
    stream, record, consumed = open_hub(source), start.record, 0
    try:
        for row in stream.skip(start.record) if start.record else stream:
            record += 1
            if record == 1 and source.text not in row:
                raise SourceError(
                    f"source {source.name}: {source.path} has no field {source.text!r}; "
                    f"it has {', '.join(row)}"
                )
            value = row.get(source.text)
            text: Value = value if isinstance(value, str) else _missing(source.text, row)
            consumed += len(value.encode("utf-8", "surrogatepass")) if isinstance(value, str) else 0
            yield _item(text, f"record {record} of {source.path}", Place(0, record), consumed)
    except SourceError:
        raise
    except Exception as error:  # network errors of half a dozen libraries
        raise SourceError(
            f"source {source.name}: {source.path} broke off after record {record} "
            f"({type(error).__name__}: {error}); run the same command again to go on from there"
        ) from error


def open_hub(source: SourceConfig) -> Any:
    """The streamed data set of a hub source; its `fallback_split` if it has no split of the wanted name.

    Raises SourceError if it cannot be reached or has neither split.
    """
    import datasets

    options: dict[str, Any] = {"streaming": True}
    if source.data_files is not None:
        options["data_files"] = source.data_files
    splits = [split for split in (source.split, source.fallback_split) if split is not None]
    for split in splits:
        try:
            return datasets.load_dataset(source.path, source.subset, split=split, **options)
        except ValueError as error:
            if "split" not in str(error).lower():
                raise SourceError(f"source {source.name}: {source.path}: {error}") from error
            reason = error
        except Exception as error:
            raise SourceError(
                f"source {source.name}: data set {source.path} cannot be opened "
                f"({type(error).__name__}: {error})"
            ) from error
    raise SourceError(
        f"source {source.name}: {source.path} has no split {' or '.join(splits)}: {reason}"
    ) from reason
