"""Readers of text, JSON lines, JSON, CSV and parquet files, plain, gzip or zstd.

A byte-order mark is removed, blank lines are skipped, and every error names the file and the line. No
function holds more of a file in memory than one record and a buffer, except those that return the whole:
`read_text`, `read_json` and the reader of CSV.
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

from nested_learning.checks import near_path

RECORD_BYTES = 1 << 28
"""Limit of the size of a record in memory, or `EXPANSION` times the file on disk if that is more."""

EXPANSION = 16
"""Compressed text expands by a factor of 3 to 5, rarely 10; data that expands further is not text."""

BUFFER = 1 << 20
"""Bytes decompressed at once. Corrupt data is noticed late, at a checksum: so much before it is lost."""

WIDE_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


CORRUPT = (gzip.BadGzipFile, EOFError, zlib.error, OSError)
"""Errors of decompressing corrupt data. An OSError with an errno is one of the disk instead."""

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


class WrongEncodingError(ValueError):
    """A file whose first bytes show that it is not UTF-8."""


class TextLine(NamedTuple):
    """A line and its number, from 1; `data` is None if it is longer than a record may be."""

    number: int
    data: bytes | None


class Record(NamedTuple):
    """An object of a file, and where it was found: `a.csv, line 3`."""

    where: str
    values: dict[str, Any]


@contextlib.contextmanager
def open_stream(path: Path) -> Iterator[tuple[BinaryIO, Callable[[], int]]]:
    """Open a decompressed stream after its byte-order mark.

    Yields:
        The stream, and a function that returns how many bytes of the file were read.

    Raises:
        WrongEncodingError: the file is in UTF-16 or UTF-32.
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
    """The ending without that of a compression, in lower case: ".jsonl" for `A.JSONL.GZ`."""
    endings = [suffix.lower() for suffix in path.suffixes]
    while endings and endings[-1] in (".gz", ".zst"):
        endings.pop()
    return endings[-1] if endings else ""


def record_limit(path: Path) -> int:
    """The largest size in bytes of a record of this file."""
    return max(RECORD_BYTES, EXPANSION * path.stat().st_size)


def read_lines(stream: BinaryIO, limit: int) -> Iterator[TextLine]:
    """The lines that hold more than white space. A line of more than `limit` bytes comes without its data."""
    number = 0
    while data := stream.readline(limit + 1):
        number += 1
        too_long = len(data) > limit
        while len(data) > limit and not data.endswith(b"\n"):
            data = stream.readline(limit + 1)
        data = data.removeprefix(codecs.BOM_UTF8)  # also inside a file, where files were joined
        if too_long:
            yield TextLine(number, None)
        elif data.strip():
            yield TextLine(number, data)


def parse_json(line: bytes) -> Any:
    """The value of a line of JSON.

    Raises:
        UnicodeDecodeError: it is not UTF-8.
        ValueError: it is not JSON.
    """
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
    """The type of a JSON value in words, such as "a list"."""
    if value is None:
        return "null"
    names = {dict: "an object", list: "a list", str: "text", bool: "a truth value", bytes: "bytes"}
    return names.get(type(value), "a number" if isinstance(value, (int, float)) else type(value).__name__)


def read_text(path: str | Path) -> str:
    """The text of a file, without a byte-order mark.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not UTF-8, or compressed data that is corrupt or expands too much to be text.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"text file {path} does not exist{near_path(Path(path))}")
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
    """The value of a JSON file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is not JSON; the message names the line.
    """
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
        ValueError: another ending, or a record that cannot be read; the message names file and line.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"file {path} does not exist{near_path(Path(path))}")
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
    """Raise ValueError for half of a surrogate pair, which JSON can hold but UTF-8 cannot."""
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{where}: holds half of a surrogate pair") from None


@contextlib.contextmanager
def _named_errors(path: Path) -> Iterator[None]:
    """Turn errors of decompression into a ValueError that names the file."""
    try:
        yield
    except CORRUPT as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ValueError(f"{path} is corrupt: {error}") from None
