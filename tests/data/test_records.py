"""The one reader: files with byte-order marks, blank lines and other habits of Excel and Windows."""

import codecs
import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nested_learning.data import ByteTokenizer, prepare_corpus
from nested_learning.data import records as records_module
from nested_learning.data.config import SourceConfig
from nested_learning.data.pipeline.sources import Document, UnusableSourceError, read_source
from nested_learning.data.records import format_of, lookup, read_json, read_records, read_text
from nested_learning.eval.intents import Example, read_examples
from nested_learning.eval.niah import essay_words
from nested_learning.eval.perplexity import read_documents
from nested_learning.eval.questions import read_questions

BOM = codecs.BOM_UTF8
TWO = [{"text": "größer", "label": "a"}, {"text": "two\nlines, 漢字", "label": "b"}]
ROWS = [json.dumps(row, ensure_ascii=False).encode() for row in TWO]
WINDOWS = BOM + b"\r\n" + ROWS[0] + b"\r\n\r\n  \t\r\n" + ROWS[1] + b"\r\n\r\n"
CSV = BOM + 'text,label\r\n\r\ngrößer,a\r\n"two\nlines, 漢字",b\r\n,\r\n'.encode()


def source(path, **options):
    return SourceConfig(name="s", path=str(path), **({"kind": "jsonl"} | options))


def test_marks_and_blank_lines_are_skipped_and_lines_are_counted(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(WINDOWS)
    found = list(read_records(tmp_path / "a.jsonl"))
    assert [record.values for record in found] == TWO
    assert [record.where for record in found] == [f"{tmp_path / 'a.jsonl'}, line {n}" for n in (2, 5)]
    (tmp_path / "a.csv").write_bytes(CSV)
    found = list(read_records(tmp_path / "a.csv"))
    assert [record.values for record in found] == TWO
    assert [record.where for record in found] == [f"{tmp_path / 'a.csv'}, line {n}" for n in (3, 4)]


def test_joined_files_hold_marks_inside(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(BOM + ROWS[0] + b"\n" + BOM + ROWS[1] + b"\n" + BOM + b"\n")
    assert [record.values for record in read_records(tmp_path / "a.jsonl")] == TWO


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
def test_every_format_and_compression_gives_the_same_records(tmp_path, ending):
    compress = {
        "": bytes,
        ".gz": gzip.compress,
        ".zst": lambda data: pa.Codec("zstd").compress(data, asbytes=True),
    }[ending]
    for name, data in (("a.jsonl", WINDOWS), ("a.csv", CSV), ("a.JSON", BOM + json.dumps(TWO).encode())):
        path = tmp_path / (name + ending)
        path.write_bytes(compress(data))
        assert [record.values for record in read_records(path)] == TWO
        assert format_of(path) == "." + name.lower().split(".")[1]
    pq.write_table(pa.Table.from_pylist(TWO), tmp_path / "a.parquet")
    assert [record.values for record in read_records(tmp_path / "a.parquet")] == TWO


def test_class_incremental_files_with_marks_and_blank_lines(tmp_path):
    expected = [Example(row["text"], row["label"]) for row in TWO]
    (tmp_path / "a.jsonl").write_bytes(WINDOWS)
    (tmp_path / "a.csv").write_bytes(CSV)
    (tmp_path / "a.json").write_bytes(BOM + json.dumps({"train": expected}).encode())
    for name in ("a.jsonl", "a.csv", "a.json"):
        assert read_examples(tmp_path / name, "train") == expected


def test_zero_shot_files_with_marks_and_blank_lines(tmp_path):
    row = {"goal": "g", "sol1": "x", "sol2": "y", "label": 1}
    line = json.dumps(row).encode()
    (tmp_path / "piqa.jsonl").write_bytes(BOM + line + b"\r\n\r\n" + line)
    found = read_questions("piqa", tmp_path, None)
    assert [question.gold for question in found] == [1, 1]
    (tmp_path / "piqa.jsonl").unlink()
    (tmp_path / "piqa.json").write_bytes(BOM + json.dumps([row]).encode())
    assert read_questions("piqa", tmp_path, None) == found[:1]


def test_perplexity_and_essay_files_with_marks(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(WINDOWS)
    (tmp_path / "b.txt").write_bytes(BOM + "größer\r\n\f\r\nend".encode())
    found = read_documents([tmp_path / "a.jsonl", tmp_path / "b.txt"], 0.1)
    assert found == [TWO[0]["text"], TWO[1]["text"], "größer", "end"]
    assert essay_words(tmp_path / "b.txt") == ["größer", "end"]


def test_a_mark_is_no_text_of_a_corpus_or_a_source(tmp_path):
    text = "some words that are many enough to split " * 20
    for name, data in (("a.txt", text.encode()), ("b.txt", BOM + text.encode())):
        (tmp_path / name).write_bytes(data)
    a, b = (
        prepare_corpus([tmp_path / name], ByteTokenizer(), tmp_path / "cache") for name in ("a.txt", "b.txt")
    )
    assert a.train.tolist() == b.train.tolist() and a.train[0] == ord("s")
    assert [item.text for item in read_source(source(tmp_path / "b.txt", kind="text"))] == [text]
    (tmp_path / "c.jsonl").write_bytes(WINDOWS)
    assert [item.text for item in read_source(source(tmp_path / "c.jsonl"))] == [row["text"] for row in TWO]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_wide_encodings_are_named(tmp_path, encoding):
    text = json.dumps(TWO[0])
    for name in ("a.jsonl", "a.txt", "a.csv"):
        (tmp_path / name).write_bytes(text.encode(encoding))
    message = r"a\.(jsonl|txt|csv) is in UTF-16 or UTF-32; save it as UTF-8"
    with pytest.raises(UnusableSourceError, match="source s: .*" + message):
        list(read_source(source(tmp_path / "a.jsonl")))
    for read in (
        lambda: read_documents([tmp_path / "a.txt"], 0.1),
        lambda: read_examples(tmp_path / "a.csv", "train"),
        lambda: list(read_records(tmp_path / "a.jsonl")),
        lambda: prepare_corpus([tmp_path / "a.txt"], ByteTokenizer(), tmp_path / "cache"),
    ):
        with pytest.raises(ValueError, match=message):
            read()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"a": 1}\n\n{"a": \n', r"a\.jsonl, line 3: not JSON: "),
        ("a.jsonl", b'{"a": 1}\n[1]\n', r"a\.jsonl, line 2: must be an object with named fields, got a list"),
        ("a.jsonl", b'\n{"a": "\xff"}\n', r"a\.jsonl, line 2: not UTF-8: bad byte at offset 7"),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl, line 1: not JSON: it is nested too deeply"),
        ("a.jsonl", b'{"a": "\\ud800 x"}', r"a\.jsonl, line 1: holds half of a surrogate pair"),
        ("a.json", b'[{"a": 1},\n\n{"a": }]', r"a\.json, line 3: not JSON: Expecting value"),
        ("a.json", b'{"a": 1}', r"a\.json must hold a list of objects, got an object"),
        ("a.json", b'[{"a": 1}, 5]', r"a\.json, record 2: must be an object with named fields, got a number"),
        ("a.csv", b"a,b\n1,2\n\n1,2,3\n", r"a\.csv, line 4: 3 cells, but the header has 2"),
        ("a.csv", b'a,b\n1,2\n1,"x\ny\n', r"a\.csv, line 3: not CSV: unexpected end of data"),
        ("a.csv", b"a,b\n1,2\n1,\xe9\n", r"a\.csv is not UTF-8: bad byte at offset 10, line 3"),
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 99, mtime=0)[:-12], r"a\.jsonl\.gz is corrupt: "),
        ("a.xml", b"", r"a\.xml must end in \.jsonl, \.json, \.csv, \.parquet"),
        ("a.parquet", b"PAR1", r"a\.parquet cannot be read after record 0: "),
    ],
)
def test_errors_name_file_and_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(read_records(tmp_path / name))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '\n{"text": "x"}', r"a\.jsonl, line 2: must have the fields text and label or category"),
        ("a.jsonl", '{"text": ["x"], "label": 1}', r"a\.jsonl, line 1: text must be text, got a list"),
        (
            "a.jsonl",
            '{"text": "x", "label": null}',
            r"a\.jsonl, line 1: label must name a class, got None",
        ),
        ("a.json", "[1]", r"a\.json must hold an object with lists by split, got a list"),
        ("a.json", '{"train": 3}', r"a\.json, 'train': must be a list, got a number"),
        (
            "a.json",
            '{"train": [["a", "b"], ["a"]]}',
            r"a\.json, 'train', record 2: must be \[text, label\], got \['a'\]",
        ),
    ],
)
def test_examples_that_cannot_be_used_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_examples(tmp_path / name, "train")


def test_long_cells_of_csv(tmp_path):
    text = "word " * 40_000
    (tmp_path / "a.csv").write_text(f"text,label\n{text},x\n")
    assert read_examples(tmp_path / "a.csv", "train") == [Example(text, "x")]


def test_missing_files_are_named(tmp_path):
    for read in (read_records, read_json, read_text):
        with pytest.raises(FileNotFoundError, match=r"none\.jsonl does not exist"):
            read(tmp_path / "none.jsonl")


def test_nested_fields():
    record = {"meta": {"text": "deep", "x": {"y": 1}}, "a.b": "flat", "a": {"b": "nested"}}
    assert lookup(record, "meta.text") == (True, "deep")
    assert lookup(record, "meta.x.y") == (True, 1)
    assert lookup(record, "a.b") == (True, "flat")
    assert (
        lookup(record, "meta.no") == lookup(record, "meta.text.no") == lookup(record, "no") == (False, None)
    )


@pytest.mark.parametrize("ending", ["jsonl.gz", "txt.gz", "txt.zst"])
def test_a_line_without_end_is_left_out_without_holding_it(tmp_path, monkeypatch, ending):
    import tracemalloc

    monkeypatch.setattr(records_module, "RECORD_BYTES", 1 << 20)
    kind, compression = ending.split(".")
    separator = b"\n" if kind == "jsonl" else b"\n\f\n"
    parts = [ROWS[0], b"x" * 30_000_000, ROWS[1]]
    data = separator.join(parts)
    path = tmp_path / f"bomb.{ending}"
    path.write_bytes(
        gzip.compress(data) if compression == "gz" else pa.Codec("zstd").compress(data, asbytes=True)
    )
    del data, parts
    tracemalloc.start()
    items = list(read_source(source(path, kind="jsonl" if kind == "jsonl" else "text")))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [isinstance(item, Document) for item in items] == [True, False, True]
    assert items[1].kind == "too_large" and "more than the 1048576 bytes" in items[1].message
    assert peak < 8 << 20
    if kind == "txt":
        with pytest.raises(ValueError, match=r"holds more than 1048576 bytes when it is decompressed"):
            read_text(path)


def test_short_lines_take_the_memory_of_their_text(tmp_path):
    import tracemalloc

    text = "ab\n" * 100_000
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(text.encode()))
    tracemalloc.start()
    (item,) = read_source(source(tmp_path / "a.txt.gz", kind="text"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert item.text == text
    assert peak < 3 << 20  # one object for a line is 36 bytes and a pointer: 4.4 MB; the buffer is 1 MiB


def test_filters_and_copies_take_the_memory_of_their_text():
    import tracemalloc

    from nested_learning.data.config import FilterConfig
    from nested_learning.data.pipeline.filters import rejection

    text = "".join(f"{i % 997:03d}\n" for i in range(40_000))
    rules = FilterConfig(
        max_symbols=None, max_duplicate_lines=1.0, max_repeated_grams=1.0, language="en", min_stop_words=0
    )
    tracemalloc.start()
    assert rejection(text, rules) is None
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12 * len(text)  # words as objects take 15 times the text
