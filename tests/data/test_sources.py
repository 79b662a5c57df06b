"""Reading: every format and compression gives the same documents; what is broken is named and counted."""

import gzip
import itertools
import json
import math

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import constants
from texts import documents

from nested_learning.data.config import SourceConfig
from nested_learning.data.pipeline.sources import (
    Document,
    Place,
    Problem,
    SourceError,
    open_hub,
    read_source,
    source_bytes,
    source_files,
)

TEXTS = [*documents(7), "with  spaces \n\n and é 漢字 🐋\n\n\nend", "last"]


def lines(texts):
    return "".join(json.dumps({"id": 3, "text": text}) + "\n" for text in texts).encode()


def compress(data, ending):
    if ending == ".gz":
        half = len(data) // 2
        return gzip.compress(data[:half]) + gzip.compress(data[half:])  # two members
    if ending == ".zst":
        codec = pa.Codec("zstd")
        return codec.compress(data, asbytes=True)
    return data


def source(kind, path, **options):
    return SourceConfig(name="s", kind=kind, path=str(path), **options)


def write(folder, kind, ending=""):
    path = folder / f"part.{kind}{ending}"
    if kind == "parquet":
        pq.write_table(pa.table({"text": TEXTS, "id": range(len(TEXTS))}), path, row_group_size=2)
    else:
        data = "\n\f\n".join(TEXTS).encode() if kind == "txt" else lines(TEXTS)
        path.write_bytes(compress(data, ending))
    return source("text" if kind == "txt" else kind, path)


@pytest.fixture(
    params=[*itertools.product(["txt", "jsonl"], ["", ".gz", ".zst"]), ("parquet", ""), ("hub", "")],
    ids="".join,
)
def good(request, tmp_path):
    kind, ending = request.param
    if kind != "hub":
        return write(tmp_path, kind, ending)
    (tmp_path / "a.jsonl").write_bytes(lines(TEXTS))
    return source("hub", "json", data_files=str(tmp_path / "a.jsonl"))


def test_the_same_documents_in_every_format(good):
    items = list(read_source(good))
    assert [item.text for item in items] == TEXTS
    consumed = [item.consumed for item in items]
    assert consumed == sorted(consumed)
    if good.kind != "hub":
        assert consumed[-1] == source_bytes(good)


def test_reading_goes_on_from_every_place(good):
    items = list(read_source(good))
    for i, item in enumerate(items):
        assert [rest.text for rest in read_source(good, item.place)] == TEXTS[i + 1 :]


def test_places_run_over_files(tmp_path):
    for name, part in (("b", TEXTS[4:]), ("a", TEXTS[:4])):
        (tmp_path / f"{name}.jsonl.gz").write_bytes(gzip.compress(lines(part)))
    (tmp_path / "notes.md").write_text("not json")
    for path in (tmp_path, tmp_path / "*.jsonl.gz"):
        items = list(read_source(source("jsonl", path)))
        assert [item.text for item in items] == TEXTS
        assert items[3].place == Place(0, 4) and items[4].place == Place(1, 1)
        assert [item.text for item in read_source(source("jsonl", path), Place(1, 2))] == TEXTS[6:]


def test_bundled_text_is_a_source():
    assert source_files(source("text", "bundled"))[0].name == "novel.txt"
    assert sum(1 for _ in read_source(source("text", "bundled"))) == 194


def outcome(item):
    return "text" if isinstance(item, Document) else item.kind


def test_every_bad_record_is_named_and_the_rest_is_read(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(
        lines(["one"])
        + b'{"text": "bro\xffken"}\n'
        + b'{"text": "half'
        + b"\n\n"  # an empty line is no record
        + b'{"other": 1}\n{"text": 5}\n[1]\n'
        + lines(["", " \n ", "two"])
        + b'{"text": "\\ud800 alone"}\n'
        + b'{"text": "cut off'
    )
    items = list(read_source(source("jsonl", path)))
    kinds = ["text", "bad_utf8", "bad_json", "missing_text", "wrong_type", "wrong_type", "empty", "empty"]
    assert [outcome(item) for item in items] == [*kinds, "text", "bad_utf8", "bad_json"]
    assert items[1].message.startswith(f"{path}, line 2: not UTF-8: bad byte at offset 13")
    assert "no text in 'text'; it has other" in items[3].message
    for i, item in enumerate(items):  # places count bad records too
        assert [outcome(x) for x in read_source(source("jsonl", path), item.place)] == [
            outcome(x) for x in items[i + 1 :]
        ]


def test_bad_bytes_in_text_and_parquet_cost_one_document(tmp_path):
    (tmp_path / "x.txt").write_bytes(b"one\n\f\nbro\xffken\n\f\n \n\f\ntwo")
    items = list(read_source(source("text", tmp_path / "x.txt")))
    assert [outcome(item) for item in items] == ["text", "bad_utf8", "empty", "text"]
    assert items[1].message == f"{tmp_path / 'x.txt'}, line 3: not UTF-8: bad byte at offset 3"
    cells = pa.array([b"one", b"bro\xffken", None, b"two"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": cells}), tmp_path / "x.parquet")
    items = list(read_source(source("parquet", tmp_path / "x.parquet")))
    assert [outcome(item) for item in items] == ["text", "bad_utf8", "empty", "text"]


@pytest.mark.parametrize("ending", [".gz", ".zst"])
@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_corrupt_file_loses_its_rest_only(tmp_path, ending, damage):
    texts = documents(400)
    data = bytearray(compress(lines(texts), ending))
    if damage == "cut":
        data = data[: len(data) * 3 // 4]
    else:
        data[len(data) * 3 // 4] ^= 255
    (tmp_path / f"a.jsonl{ending}").write_bytes(data)
    (tmp_path / f"b.jsonl{ending}").write_bytes(compress(lines(["fine"]), ending))
    items = list(read_source(source("jsonl", tmp_path)))
    problems = [item for item in items if isinstance(item, Problem) and item.kind == "corrupt_file"]
    assert len(problems) == 1
    assert f"a.jsonl{ending} is corrupt after record" in problems[0].message
    assert problems[0].place == Place(1, 0) and items[-1].text == "fine"
    read = [item.text for item in items if isinstance(item, Document)]
    assert read[:-1] == texts[: len(read) - 1]  # what was read is whole


def test_a_corrupt_parquet_file_is_named(tmp_path):
    write(tmp_path, "parquet")
    path = tmp_path / "part.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    (item,) = read_source(source("parquet", path))
    assert item.kind == "corrupt_file" and "part.parquet is corrupt after record 0" in item.message


def test_a_record_far_longer_than_a_buffer(tmp_path):
    text = "word " * 1_000_000
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(lines([text, "end"])))
    assert [item.text for item in read_source(source("jsonl", tmp_path / "x.jsonl.gz"))] == [text, "end"]


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "hub"])
def test_a_field_that_no_record_has_is_an_error(tmp_path, kind):
    where = write(tmp_path, "jsonl" if kind == "hub" else kind)
    if kind == "hub":
        where = source("hub", "json", data_files=where.path)
    where.text = "content"
    with pytest.raises(SourceError, match="'content'.*text.*"):
        list(read_source(where))


def test_split_fallback(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines(TEXTS))
    options = {"data_files": str(tmp_path / "a.jsonl"), "split": "validation"}
    with pytest.raises(SourceError, match="json has no split validation"):
        list(read_source(source("hub", "json", **options)))
    found = list(read_source(source("hub", "json", fallback_split="train", **options)))
    assert [item.text for item in found] == TEXTS


class Breaking:
    """A data set whose connection is lost after two records."""

    def __init__(self, first=0):
        self.first = first

    def skip(self, count):
        return Breaking(count)

    def __iter__(self):
        for i in range(self.first, len(TEXTS)):
            if i == 2 and not self.first:
                raise ConnectionError("connection reset")
            yield {"text": TEXTS[i]}


def test_an_interrupted_download_can_be_taken_up_again(monkeypatch):
    monkeypatch.setattr("nested_learning.data.pipeline.sources.open_hub", lambda source: Breaking())
    got, hub = [], source("hub", "some/data")
    with pytest.raises(SourceError, match=r"broke off after record 2 \(ConnectionError: connection reset\)"):
        for item in read_source(hub):
            got.append(item)
    rest = list(read_source(hub, got[-1].place))
    assert [item.text for item in got + rest] == TEXTS


def test_a_hub_that_cannot_be_reached_is_one_sentence(monkeypatch):
    import datasets

    def fail(*arguments, **options):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        SourceError, match=r"data set some/data cannot be opened \(ConnectionError: no route\)"
    ):
        list(read_source(source("hub", "some/data")))


def test_the_hub_is_asked_first_whether_it_is_there(tmp_path, monkeypatch, no_hub):
    """For data sets on the hub: not for a builder of local files, nor for a folder."""
    with pytest.raises(SourceError, match=r"source s: data set some/data: http://.* cannot be reached: "):
        open_hub(source("hub", "some/data"))
    with pytest.raises(SourceError, match="cannot be reached: .*; take local files, or set HF_HUB"):
        open_hub(source("hub", "some/data", data_files="a.json"))
    (tmp_path / "a.jsonl").write_bytes(lines(TEXTS))
    for local in (source("hub", "json", data_files=str(tmp_path / "a.jsonl")), source("hub", str(tmp_path))):
        assert next(iter(open_hub(local)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "a/b"}, "source a/b: name may hold letters"),
        ({"kind": "csv"}, "source s: kind must be one of text, jsonl, parquet, hub, got 'csv'"),
        ({"weight": 0.0}, "source s: weight must be positive, got 0.0"),
        ({"weight": math.nan}, "source s.weight must be a finite number, got nan"),
        ({"limit": 0}, "source s: limit must be at least 1, got 0"),
    ],
)
def test_bad_settings_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        SourceConfig(**({"name": "s", "kind": "text", "path": "x"} | change))


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"source s: no jsonl file at .*none"):
        list(read_source(source("jsonl", tmp_path / "none*.jsonl")))
