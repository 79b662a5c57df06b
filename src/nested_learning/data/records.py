"""The one reader of text, JSON lines, JSON and CSV files, plain, gzip or zstd.

Files come from Excel, Windows, exports and downloads: a byte-order mark is taken off, blank lines are
skipped, and every error names the file and the line. Nothing here holds more of a file than one record and a
buffer, except `read_text`, `read_json` and CSV, whose callers want the whole.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

RECORD_BYTES = 1 << 28
"""A record may take so much memory, or `EXPANSION` times the file on disk if that is more."""

EXPANSION = 16
"""Text shrinks to a third or a fifth, rarely to a tenth; what expands further is no text."""

BUFFER = 1 << 20
"""Bytes decompressed at once. What is broken shows up late, at a checksum: so much before it is given up."""

WIDE_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


CORRUPT = (gzip.BadGzipFile, EOFError, zlib.error, OSError)
"""What decompressing broken data raises; an OSError with an errno is the disk's."""

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


class WrongEncodingError(ValueError):
    """A file that is not in UTF-8 from its first bytes on."""


class Line(NamedTuple):
    """A line and its number, from 1; `data` is None if it is longer than a record may be."""

    number: int
    data: bytes | None


class Record(NamedTuple):
    """An object of a file, and where it stands: `a.csv, line 3`."""

    where: str
    values: dict[str, Any]


@contextlib.contextmanager
def open_stream(path: Path) -> Iterator[tuple[BinaryIO, Callable[[], int]]]:
    """A decompressed stream behind a byte-order mark, and a function that tells how far the file was read.

    Raises WrongEncodingError for UTF-16 and UTF-32.
    """
    with _decompressed(path) as (stream, tell):
        buffered = stream if isinstance(stream, io.BufferedReader) else io.BufferedReader(stream, BUFFER)
        start = buffered.peek(4)[:4]
        if start.startswith(WIDE_MARKS) or b"\0" in start[:2]:
            raise WrongEncodingError(f"{path} is in UTF-16 or UTF-32; save it as UTF-8")
        if start.startswith(codecs.BOM_UTF8):
            buffered.read(len(codecs.BOM_UTF8))
        yield cast(BinaryIO, buffered), tell


@contextlib.contextmanager
def _decompressed(path: Path) -> Iterator[tuple[Any, Callable[[], int]]]:
    ending = path.suffix.lower()
    if ending == ".zst":
        import pyarrow as pa

        with pa.OSFile(str(path)) as raw, pa.CompressedInputStream(raw, "zstd") as stream:
            yield stream, raw.tell
        return
    with path.open("rb") as file:
        if ending == ".gz":
            with gzip.GzipFile(fileobj=file) as unzipped:
                yield unzipped, file.tell
        else:
            yield file, file.tell


def format_of(path: Path) -> str:
    """The ending that tells the format, in lower case: ".jsonl" for `A.JSONL.GZ`."""
    endings = [suffix.lower() for suffix in path.suffixes]
    while endings and endings[-1] in (".gz", ".zst"):
        endings.pop()
    return endings[-1] if endings else ""


def record_limit(path: Path) -> int:
    """Bytes that a record of this file may have."""
    return max(RECORD_BYTES, EXPANSION * path.stat().st_size)


def read_lines(stream: BinaryIO, limit: int) -> Iterator[Line]:
    """The lines that hold more than white space; of one of more than `limit` bytes, nothing is kept."""
    number = 0
    while data := stream.readline(limit + 1):
        number += 1
        too_long = len(data) > limit
        while len(data) > limit and not data.endswith(b"\n"):
            data = stream.readline(limit + 1)
        data = data.removeprefix(codecs.BOM_UTF8)  # also inside a file, where files were joined
        if too_long:
            yield Line(number, None)
        elif data.strip():
            yield Line(number, data)


def parse_json(line: bytes) -> Any:
    """The value of a line. Raises ValueError, UnicodeDecodeError if it is not UTF-8."""
    try:
        return json.loads(line.decode("utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def lookup(record: dict[str, Any], field: str) -> tuple[bool, Any]:
    """Whether a record has a field, and its value; `a.b` is also the field b of the field a."""
    if field in record:
        return True, record[field]
    head, dot, rest = field.partition(".")
    inner = record.get(head)
    return lookup(inner, rest) if dot and isinstance(inner, dict) else (False, None)


def type_name(value: Any) -> str:
    """What a JSON value is, for messages: "a list"."""
    if value is None:
        return "null"
    names = {dict: "an object", list: "a list", str: "text", bool: "a truth value", bytes: "bytes"}
    return names.get(type(value), "a number" if isinstance(value, (int, float)) else type(value).__name__)


def read_text(path: str | Path) -> str:
    """The text of a file, without a byte-order mark.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not UTF-8, or compressed data that is broken or no text by its size.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"text file {path} does not exist")
    limit = record_limit(path)
    with _named_errors(path), open_stream(path) as (stream, _):
        data = stream.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"text file {path} holds more than {limit} bytes when it is decompressed")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"text file {path} is not UTF-8: bad byte at offset {error.start}, line {line}"
        ) from None


def read_json(path: str | Path) -> Any:
    """The value of a JSON file. Raises FileNotFoundError, and ValueError with the line of what is wrong."""
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: not JSON: {error.msg}") from None
    except RecursionError:
        raise ValueError(f"{path}: not usable JSON: it is nested too deeply") from None


def read_records(path: str | Path) -> Iterator[Record]:
    """The records of a file: `.jsonl`, `.json` (a list of objects), `.csv` (with a header) or `.parquet`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another ending, or a record that cannot be read, by file and line.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"file {path} does not exist")
    readers = {".jsonl": _jsonl, ".json": _json_list, ".csv": _csv, ".parquet": _parquet}
    if (kind := format_of(path)) not in readers:
        raise ValueError(f"{path} must end in {', '.join(readers)}")
    return readers[kind](path)


def _jsonl(path: Path) -> Iterator[Record]:
    with _named_errors(path), open_stream(path) as (stream, _):
        for line in read_lines(stream, record_limit(path)):
            where = f"{path}, line {line.number}"
            if line.data is None:
                raise ValueError(f"{where}: longer than {record_limit(path)} bytes")
            try:
                value = parse_json(line.data)
            except UnicodeDecodeError as error:
                raise ValueError(f"{where}: not UTF-8: bad byte at offset {error.start}") from None
            except ValueError as error:
                raise ValueError(f"{where}: not JSON: {error}") from None
            if _SURROGATE.search(line.data):
                _check_pairs(where, value)
            yield Record(where, _object(where, value))


def _json_list(path: Path) -> Iterator[Record]:
    content = read_json(path)
    if not isinstance(content, list):
        raise ValueError(f"{path} must hold a list of objects, got {type_name(content)}")
    for number, value in enumerate(content, 1):
        where = f"{path}, record {number}"
        _check_pairs(where, value)
        yield Record(where, _object(where, value))


def _csv(path: Path) -> Iterator[Record]:
    text = read_text(path)
    csv.field_size_limit(max(csv.field_size_limit(), len(text) + 1))  # cells are texts, of any length
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] | None = None
    while True:
        where = f"{path}, line {rows.line_num + 1}"
        try:
            cells = next(rows, None)
        except csv.Error as error:
            raise ValueError(f"{where}: not CSV: {error}") from None
        if cells is None:
            return
        if not any(map(str.strip, cells)):
            continue
        if header is None:
            header = [name.strip() for name in cells]
        elif len(cells) != len(header):
            raise ValueError(f"{where}: {len(cells)} cells, but the header has {len(header)}")
        else:
            yield Record(where, dict(zip(header, cells, strict=True)))


def _parquet(path: Path) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                for values in batch.to_pylist():
                    number += 1
                    yield Record(f"{path}, record {number}", values)
    except pa.ArrowException as error:
        raise ValueError(f"{path} cannot be read after record {number}: {error}") from None


def _object(where: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: must be an object with named fields, got {type_name(value)}")
    return value


def _check_pairs(where: str, value: Any) -> None:
    """ValueError for half of a surrogate pair, which JSON can write but no text can hold."""
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{where}: holds half of a surrogate pair") from None


@contextlib.contextmanager
def _named_errors(path: Path) -> Iterator[None]:
    """Errors of decompression as a ValueError that names the file."""
    try:
        yield
    except CORRUPT as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ValueError(f"{path} is corrupt: {error}") from None
