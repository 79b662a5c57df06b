"""Documents from text, jsonl and parquet files, plain, gzip or zstd, and from Hugging Face `datasets`.

A bad record does not stop the reading: readers yield a `Problem` in its place, which callers count
(`tally`) to refuse a source with too many. Every item holds the position at which it ends, from which
reading can resume.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from nested_learning.data.config import SourceConfig
from nested_learning.data.corpus import bundled_files
from nested_learning.data.files import COMPRESSIONS, TEXT_ENDINGS, Listing, find_files, no_file
from nested_learning.data.records import (
    CORRUPT,
    WrongEncodingError,
    lookup,
    open_stream,
    parse_json,
    read_lines,
    record_limit,
    type_name,
)
from nested_learning.hub import check_hub

ENDINGS = {"text": TEXT_ENDINGS, "jsonl": (".jsonl", ".json"), "parquet": (".parquet",)}

BATCH_ROWS = 64
"""Rows of a parquet file that are held at once."""

TEXT_TYPES = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view", "null")
"""Types of a parquet column that may hold text, as arrow writes them."""


class SourceError(ValueError):
    """A source cannot be read, or not to its end; the message says what to do about it."""


class UnusableSourceError(SourceError):
    """A source can be read, but does not hold usable text."""

    exit_status = 1


class CorruptFileError(Exception):
    """The rest of a file cannot be decoded."""


class Place(NamedTuple):
    """A position in a source: `record` records of file number `file` and all files before it were read."""

    file: int = 0
    record: int = 0


START = Place()


class Document(NamedTuple):
    """A non-empty text.

    Args:
        text: of the document.
        place: the position after it.
        consumed: bytes of the source read so far.
    """

    text: str
    place: Place
    consumed: int


class Problem(NamedTuple):
    """A record, or the rest of a file, that cannot be used.

    Args:
        kind: for counting.
        message: one sentence.
        place: the position after it.
        consumed: bytes of the source read so far.
        lost: bytes of the file that are left out, if it is the rest of a file.
    """

    kind: str
    message: str
    place: Place
    consumed: int
    lost: int = 0


Item = Document | Problem
Value = str | bytes | Problem
"""A record as the reader of a format returns it. `read_source` fills in the place of a `Problem`."""

Read = Iterator[tuple[str, Value, int]]
"""Yielded by the reader of a format: where the record is in the file ("line 3"), the record, bytes read."""


def list_source(source: SourceConfig) -> Listing:
    """The files of a local source, sorted by name, and those left out.

    Raises:
        FileNotFoundError: there is none.
    """
    if source.path == "bundled":
        return Listing(files=bundled_files())
    endings = [ending + compression for ending in ENDINGS[source.kind] for compression in COMPRESSIONS]
    try:
        found = find_files(source.path, endings)
        if not found.files:
            raise no_file(source.kind, source.path, found)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"source {source.name}: {error}") from None
    return found


def source_files(source: SourceConfig) -> list[Path]:
    """The files of a local source, sorted by name.

    Raises:
        FileNotFoundError: there is none.
    """
    return list_source(source).files


def source_bytes(source: SourceConfig) -> int | None:
    """Bytes on disk of a local source (its compressed size), or None for a hub data set."""
    if source.kind == "hub":
        return None
    return sum(file.stat().st_size for file in source_files(source))


def read_source(source: SourceConfig, start: Place = START) -> Iterator[Item]:
    """The documents of `source` after `start`, in a fixed order, with the problems in between.

    Raises:
        FileNotFoundError: no file at the path.
        UnusableSourceError: no record of a file has the text field, a column does not hold text, or a file is
            in UTF-16.
        SourceError: a hub data set cannot be reached, or the connection broke.
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
    read: Callable[[Path, str], Read],
    source: SourceConfig,
    file: Path,
    place: Place,
    start: Place,
    before: int,
) -> Iterator[Item]:
    """Read one file: number its records, decode them, and turn bad ones into problems."""
    number, record, without = place.file, 0, 0
    skip = start.record if start.file == number else 0
    consumed = before
    try:
        for name, value, position in read(file, source.text):
            record, consumed = record + 1, before + position
            if isinstance(value, Problem) and value.kind == "missing_text":
                without += 1
            if record > skip:
                yield _item(value, f"{file}, {name}", Place(number, record), consumed)
    except WrongEncodingError as error:
        raise UnusableSourceError(f"source {source.name}: {error}") from None
    except (CorruptFileError, *CORRUPT) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the disk, not the content
            raise
        message = f"{file} is corrupt after record {record} ({error}); the rest of it is left out"
        lost = before + file.stat().st_size - consumed
        yield Problem("corrupt_file", message, Place(number + 1, 0), consumed, lost)
        return
    if record and without == record:
        raise UnusableSourceError(
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
            message = f"{where}: not UTF-8: bad byte at offset {error.start}"
            return Problem("bad_utf8", message, place, consumed)
    if not value.strip():
        return Problem("empty", f"{where}: empty", place, consumed)
    if not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):  # from "\ud800" in JSON
        return Problem("bad_utf8", f"{where}: holds half of a surrogate pair", place, consumed)
    return Document(value, place, consumed)


def _problem(kind: str, message: str) -> Problem:
    return Problem(kind, message, START, 0)


def _too_large(limit: int) -> Problem:
    return _problem("too_large", f"more than the {limit} bytes that a record of this file may have")


def _text_of(record: object, field: str) -> Value:
    """The text of a record, or a `Problem`. `null` is an empty text."""
    if not isinstance(record, dict):
        return _problem("wrong_type", f"must be an object with the field {field!r}, got {type_name(record)}")
    there, value = lookup(record, field)
    if isinstance(value, str):
        return value
    if not there:
        has = ", ".join(map(str, list(record)[:10])) or "nothing"
        return _problem("missing_text", f"no text in {field!r}; it has {has}")
    if value is None:
        return ""
    return _problem("wrong_type", f"{field!r} must be text, got {type_name(value)}")


def _read_text(path: Path, field: str) -> Read:
    """Read a file of documents, which end at a line that holds only a form feed."""
    limit, number, start = record_limit(path), 1, 1
    document, too_large = bytearray(), False
    with open_stream(path) as (stream, tell):
        while line := stream.readline(limit + 1):
            if line.rstrip(b"\r\n") == b"\f":
                whole = bytes(document).removesuffix(b"\n").removesuffix(b"\r")
                yield f"line {start}", _too_large(limit) if too_large else whole, tell()
                document, too_large, start = bytearray(), False, number + 1
            elif too_large or len(document) + len(line) > limit:
                document, too_large = bytearray(), True
            else:
                document += line
            number += line.endswith(b"\n")
        if document or too_large:
            yield f"line {start}", _too_large(limit) if too_large else bytes(document), tell()


def _read_jsonl(path: Path, field: str) -> Read:
    limit = record_limit(path)
    with open_stream(path) as (stream, tell):
        for line in read_lines(stream, limit):
            text = _too_large(limit) if line.data is None else _json_text(line.data, field)
            yield f"line {line.number}", text, tell()


def _json_text(line: bytes, field: str) -> Value:
    try:
        record = parse_json(line)
    except UnicodeDecodeError as error:
        return _problem("bad_utf8", f"not UTF-8: bad byte at offset {error.start}")
    except ValueError as error:
        return _problem("bad_json", f"not JSON: {error}")
    return _text_of(record, field)


def _read_parquet(path: Path, field: str) -> Read:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            parts = _column(file.schema_arrow, field, path)
            column = ".".join(parts)
            _check_expansion(file.metadata, column, path)
            size, rows, done = path.stat().st_size, file.metadata.num_rows, 0
            for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=[column]):
                for cell in _text_cells(batch, parts):  # bytes, so that bad UTF-8 becomes a problem
                    done += 1
                    yield f"record {done}", cell.as_py() or b"", size * done // rows
    except pa.ArrowException as error:
        raise CorruptFileError(str(error)) from error


def _column(schema: Any, field: str, path: Path) -> list[str]:
    """The path to a column of text, from the outermost column inwards.

    Raises:
        UnusableSourceError: there is no such column, or it does not hold text.
    """
    import pyarrow as pa

    parts = [field] if field in schema.names else field.split(".")
    kind: Any = pa.struct(list(schema))
    for part in parts:
        names = [kind.field(i).name for i in range(kind.num_fields)] if pa.types.is_struct(kind) else []
        if names.count(part) != 1:
            count = "more than one" if part in names else "no"
            raise UnusableSourceError(
                f"{path} has {count} column {field!r}; at {part!r} it has {', '.join(names) or 'none'}; "
                "set `text` to the right one"
            )
        kind = kind.field(part).type
    plain = kind.value_type if pa.types.is_dictionary(kind) else kind
    if str(plain) not in TEXT_TYPES:
        raise UnusableSourceError(f"{path}: column {field!r} must hold text, got {kind}")
    return parts


def _check_expansion(metadata: Any, column: str, path: Path) -> None:
    """Check that a column does not hold more than text of the file's compressed size can.

    Raises:
        CorruptFileError: it does.
    """
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    chunks = [group.column(i) for group in groups for i in range(group.num_columns)]
    expanded = sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema == column)
    if expanded > record_limit(path):
        raise CorruptFileError(f"column {column!r} expands to {expanded} bytes")


def _text_cells(batch: Any, parts: list[str]) -> Any:
    """The cells of a text column as bytes."""
    import pyarrow as pa
    import pyarrow.compute as pc

    cells = batch.column(batch.schema.get_field_index(parts[0]))
    for part in parts[1:]:
        cells = pc.struct_field(cells, part)
    cells = cells.dictionary_decode() if pa.types.is_dictionary(cells.type) else cells
    return cells.cast(pa.large_binary())


def _read_hub(source: SourceConfig, start: Place) -> Iterator[Item]:
    """Stream a hub data set; record n ends at `Place(0, n)`."""
    stream, record, consumed = open_hub(source), start.record, 0
    try:
        for row in stream.skip(start.record) if start.record else stream:
            record += 1
            if record == 1 and not lookup(row, source.text)[0]:
                raise UnusableSourceError(
                    f"source {source.name}: {source.path} has no field {source.text!r}; "
                    f"it has {', '.join(row)}"
                )
            text = _text_of(row, source.text)
            consumed += len(text.encode("utf-8", "surrogatepass")) if isinstance(text, str) else 0
            yield _item(text, f"{source.path}, record {record}", Place(0, record), consumed)
    except SourceError:
        raise
    except Exception as error:  # network errors of half a dozen libraries
        raise SourceError(
            f"source {source.name}: {source.path} broke off after record {record} "
            f"({type(error).__name__}: {error}); run the same command again to go on from there"
        ) from error


def open_hub(source: SourceConfig) -> Any:
    """The streamed data set of a hub source, in its `fallback_split` if the wanted split does not exist.

    Raises:
        SourceError: it cannot be reached or has neither split.
    """
    if not _is_local(source):
        try:
            check_hub("take local files")
        except ConnectionError as error:
            raise SourceError(f"source {source.name}: data set {source.path}: {error}") from error
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


def _is_local(source: SourceConfig) -> bool:
    """Whether a hub source is a folder or a builder such as "json", which can be read without the hub."""
    builder = source.data_files is not None and "/" not in source.path
    return builder or Path(source.path).exists()
