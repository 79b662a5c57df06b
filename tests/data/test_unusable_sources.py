"""A source that does not hold what it should is refused by name, before anything is called complete."""

import json
import runpy
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nested_learning.commands.data.measure import write_text
from nested_learning.data import ByteTokenizer, MixtureConfig, SourceConfig
from nested_learning.data.config import FilterConfig
from nested_learning.data.pipeline.process import ProcessingJob, process_mixture
from nested_learning.data.pipeline.sampling import sample_mixture
from nested_learning.data.pipeline.sources import Problem, UnusableSourceError, read_source
from nested_learning.data.pipeline.validate import check_mixture, check_source

ROOT = Path(__file__).parents[2]
GOOD = [f"document number {i} with some words of its own: {i * i}" for i in range(40)]


def lines(values):
    return "".join(json.dumps({"text": value}) + "\n" for value in values)


def parquet(path, cells, **options):
    pq.write_table(pa.table({"text": cells, "id": range(len(cells))}), path, **options)
    return SourceConfig(name="p", kind="parquet", path=str(path), weight=3.0)


def jsonl(path, content):
    path.write_text(content)
    return SourceConfig(name="j", kind="jsonl", path=str(path), weight=3.0)


@pytest.fixture
def good(tmp_path):
    (tmp_path / "good.jsonl").write_text(lines(GOOD))
    return SourceConfig(name="good", kind="jsonl", path=str(tmp_path / "good.jsonl"))


def process(tmp_path, *sources):
    mixture = MixtureConfig(sources=sources, valid_share=0)
    job = ProcessingJob(
        mixture=mixture,
        tokenizer=ByteTokenizer(),
        folder=tmp_path / "out",
        progress=False,
        log=lambda _: None,
    )
    return process_mixture(job)


def refused(tmp_path, good, source, message):
    """Every reader of whole sources refuses `source`, twice, and nothing is called complete."""
    for _ in range(2):
        with pytest.raises(UnusableSourceError, match=message):
            process(tmp_path, good, source)
        assert not (tmp_path / "out" / "mixture.json").exists()
    with pytest.raises(UnusableSourceError, match=message):
        sample_mixture(MixtureConfig(sources=(good, source)), 1000, progress=False)


@pytest.mark.parametrize(
    ("cells", "kind"),
    [
        ([["a", "b"]] * 9, "list<element: string>"),
        (list(range(9)), "int64"),
        ([{"title": "a", "body": "b"}] * 9, "struct<title: string, body: string>"),
    ],
)
def test_a_column_of_another_type_is_named(tmp_path, good, cells, kind):
    source = parquet(tmp_path / "x.parquet", cells)
    message = f"x.parquet: column 'text' must hold text, got {kind}"
    refused(tmp_path, good, source, message)
    _, (problem,) = check_mixture(MixtureConfig(sources=(good, source)))
    assert message in problem


def test_the_script_ends_with_status_1(tmp_path, good, monkeypatch, capsys):
    parquet(tmp_path / "x.parquet", list(range(9)))
    (tmp_path / "mine.yaml").write_text(f"""
shards: {tmp_path / "out"}
tokenizer: {{kind: byte, vocab_size: 257}}
mixture:
  sources:
    - {{name: good, kind: jsonl, path: {good.path}}}
    - {{name: p, kind: parquet, path: {tmp_path / "x.parquet"}, weight: 3}}
""")
    monkeypatch.setattr(
        sys, "argv", ["process_mixture.py", str(tmp_path / "mine.yaml"), "--workers", "0", "--no-progress"]
    )
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "scripts/data/process_mixture.py"), run_name="__main__")
    out, err = capsys.readouterr()
    assert stop.value.code == 1
    assert (
        err.startswith("process_mixture.py: ") and "must hold text, got int64" in err and err.count("\n") == 1
    )
    assert "complete" not in out and not (tmp_path / "out" / "mixture.json").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            lines([1, [2], {"a": 3}]),
            r"none of its 3 records is usable \(wrong_type 3\), the first: "
            ".*x.jsonl, line 1: 'text' must be text, got a number",
        ),
        (lines(["", None, " "]), r"none of its 3 records is usable \(empty 3\)"),
        (
            "{\n" * 5 + lines(GOOD),
            r"5 of its 45 records cannot be read \(bad_json 5\), the first: .*x.jsonl, line 1: not JSON",
        ),
        (lines(GOOD) + '{"body": "x"}\n' * 5, r"5 of its 45 records cannot be read \(missing_text 5\)"),
        ("", r"none of its 0 records is usable"),
    ],
)
def test_sources_with_too_little_that_can_be_read(tmp_path, good, content, message):
    source = jsonl(tmp_path / "x.jsonl", content)
    refused(tmp_path, good, source, message)
    with pytest.raises(UnusableSourceError, match=message):
        check_source(source)


def test_few_bad_records_are_counted_and_left_out(tmp_path, good):
    source = jsonl(tmp_path / "x.jsonl", lines([*(text[::-1] for text in GOOD), 5, None]) + "{\n")
    manifest = process(tmp_path, good, source)
    assert manifest["sources"]["j"]["dropped"] == {"wrong_type": 1, "empty": 1, "bad_json": 1}
    assert manifest["sources"]["j"]["splits"]["train"]["documents"] == 40


@pytest.mark.parametrize(("files", "fine"), [(2, False), (9, False), (11, True)])
def test_a_source_with_large_corrupt_files_is_refused(tmp_path, good, files, fine):
    for number in range(files):
        parquet(tmp_path / f"part-{number:02d}.parquet", [f"{number} {text}" for text in GOOD])
    broken = tmp_path / "part-01.parquet"
    broken.write_bytes(broken.read_bytes()[:-8] + b"cut off!")
    source = SourceConfig(name="p", kind="parquet", path=str(tmp_path / "part-*"))
    (problem,) = [item for item in read_source(source) if isinstance(item, Problem)]
    assert problem.kind == "corrupt_file" and problem.lost == broken.stat().st_size
    source = SourceConfig(name="p", kind="parquet", path=str(tmp_path / "part-*"))
    if fine:
        assert process(tmp_path, source)["sources"]["p"]["dropped"]["corrupt_file"] == 1
    else:
        message = (
            rf"{problem.lost} of its \d+ bytes are in corrupt files \(corrupt_file 1\), the first: .*part-01"
        )
        refused(tmp_path, good, source, message)


def test_a_source_of_which_no_document_is_kept_is_refused(tmp_path, good):
    source = SourceConfig(name="cut", kind="jsonl", path=good.path, filter=FilterConfig(min_chars=5000))
    with pytest.raises(
        UnusableSourceError, match="source cut: no document is left for training; dropped: {'too_short': 40}"
    ):
        process(tmp_path, good, source)
    assert not (tmp_path / "out" / "mixture.json").exists()
    with pytest.raises(UnusableSourceError, match="source cut: its filter leaves no document"):
        sample_mixture(MixtureConfig(sources=(good, source)), 1000, progress=False)


def test_measuring_a_source_without_text_ends(tmp_path):
    with pytest.raises(ValueError, match="source j: it holds no text"):
        write_text(jsonl(tmp_path / "x.jsonl", lines([1, 2])), tmp_path / "out.jsonl", 1)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("field", ["meta.text", "meta.page.body"])
def test_nested_fields_can_be_named(tmp_path, kind, field):
    rows = [
        {"meta": {"text": text, "page": {"body": text, "n": i}}, "text": 3} for i, text in enumerate(GOOD)
    ]
    rows += [{"meta": None, "text": 3}]
    path = tmp_path / f"x.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = SourceConfig(name="n", kind=kind, path=str(path), text=field)
    *items, last = read_source(source)
    assert [item.text for item in items] == GOOD and isinstance(last, Problem)


def test_a_column_with_a_dot_in_its_name_comes_first(tmp_path):
    pq.write_table(pa.table({"meta.text": ["flat"]}), tmp_path / "x.parquet")
    (item,) = read_source(SourceConfig(name="n", kind="parquet", path=str(tmp_path), text="meta.text"))
    assert item.text == "flat"


def test_a_nested_column_that_is_not_there_is_named(tmp_path):
    pq.write_table(pa.table({"meta": [{"title": "a", "id": 1}]}), tmp_path / "x.parquet")
    source = SourceConfig(name="n", kind="parquet", path=str(tmp_path), text="meta.text")
    with pytest.raises(
        UnusableSourceError, match=r"x.parquet has no column 'meta.text'; at 'text' it has title, id; set"
    ):
        list(read_source(source))


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.binary(), pa.dictionary(pa.int32(), pa.string())]
)
def test_every_type_of_text_can_be_read(tmp_path, kind):
    cells = pa.array(["one", None, "zwei ö"], pa.string())
    cells = cells.dictionary_encode() if pa.types.is_dictionary(kind) else cells.cast(kind)
    source = parquet(tmp_path / "x.parquet", cells)
    assert [
        getattr(item, "text", item.kind if isinstance(item, Problem) else "") for item in read_source(source)
    ] == [
        "one",
        "empty",
        "zwei ö",
    ]


def test_a_parquet_bomb_is_not_opened(tmp_path, monkeypatch):
    from nested_learning.data import records

    monkeypatch.setattr(records, "RECORD_BYTES", 1 << 20)
    cells = [str(i) + "x" * 300_000 for i in range(20)]
    source = parquet(tmp_path / "x.parquet", cells, compression="zstd", use_dictionary=False)
    (problem,) = read_source(source)
    assert problem.kind == "corrupt_file" and "column 'text' expands to 6" in problem.message


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"weight"', '"wait"', "mixture.json is damaged: it does not describe shards"),
        ('"good": {', '"../good": {', "mixture.json is damaged: it does not describe shards"),
        ('"shards": [', '"shards": ["a"], "old": [', "mixture.json is damaged: it does not describe shards"),
        ('"version": 1', '"version": "1"', "mixture.json has version '1', this code reads 1"),
        ("}", "", "mixture.json, line [0-9]+: not JSON"),
    ],
)
def test_a_damaged_description_of_shards_is_named(tmp_path, good, old, new, message):
    from nested_learning.data import ShardFolder

    process(tmp_path, good)
    file = tmp_path / "out" / "mixture.json"
    content = file.read_text()
    assert old in content
    file.write_text(content.replace(old, new))
    with pytest.raises(ValueError, match=message):
        ShardFolder(tmp_path / "out")
