"""Which files a name means: folders with links, droppings and odd names; what is left out is said."""

import json
import os

import pytest

from nested_learning.config import load_config
from nested_learning.data import ByteTokenizer
from nested_learning.data.config import SourceConfig
from nested_learning.data.corpus import bundled_files, load_corpus, text_files
from nested_learning.data.files import find_files
from nested_learning.data.pipeline.process import ProcessingJob, process_mixture
from nested_learning.data.pipeline.sources import read_source, source_files
from nested_learning.eval.compare import result_files
from nested_learning.eval.perplexity import read_documents
from nested_learning.eval.segments import Segment

TEXT = (".txt", ".txt.gz")


@pytest.fixture
def folder(tmp_path):
    """A folder as people have them; its three texts are own.txt, linked.txt and part/deep.TXT."""
    root, elsewhere = tmp_path / "my [2024] texts", tmp_path / "elsewhere"
    for path in (root / "book.txt", elsewhere / "part", root / ".git", root / "__MACOSX"):
        path.mkdir(parents=True)
    (root / "own.txt").write_text("own")
    (elsewhere / "far.txt").write_text("linked")
    (elsewhere / "part" / "deep.TXT").write_text("deep")
    (root / "linked.txt").symlink_to(elsewhere / "far.txt")
    (root / "part").symlink_to(elsewhere / "part")
    (elsewhere / "part" / "up").symlink_to(root)  # a cycle
    (root / "again.txt").symlink_to(root / "own.txt")
    (root / "gone.txt").symlink_to(tmp_path / "nowhere.txt")
    (root / "empty.txt").write_text("")
    (root / "notes.pdf").write_text("%PDF")
    for name in (
        "._own.txt",
        ".DS_Store",
        "Thumbs.db",
        "desktop.ini",
        "own.txt~",
        ".git/a.txt",
        "__MACOSX/b.txt",
    ):
        (root / name).write_text("dropping")
    return root


def names(listing):
    return {path.name for path in listing.files}


def test_a_folder_gives_its_texts_and_says_what_is_left_out(folder):
    found = find_files(folder, TEXT)
    assert names(found) in ({"own.txt", "linked.txt", "deep.TXT"}, {"again.txt", "linked.txt", "deep.TXT"})
    assert found.files == sorted(found.files)
    left = {reason: sorted(path.name for path in paths) for reason, paths in found.left_out.items()}
    assert left.pop("same file again") in (["own.txt"], ["again.txt"])
    hidden = [".DS_Store", "._own.txt", ".git", "Thumbs.db", "__MACOSX", "desktop.ini", "own.txt~"]
    assert left == {
        "hidden or system file": hidden,
        "broken link": ["gone.txt"],
        "empty": ["empty.txt"],
        "other ending": ["notes.pdf"],
        "same folder again": ["up"],
    }
    assert found.describe().startswith(
        "3 files; left out: broken link 1 (gone.txt), empty 1 (empty.txt), hidden"
    )


def test_patterns_work_below_folders_with_brackets(folder):
    assert names(find_files(folder / "l*.txt")) == {"linked.txt"}
    assert names(find_files(folder / "own.txt")) == {"own.txt"}
    assert names(find_files(folder.parent / "my*" / "**" / "*.TXT")) == {"deep.TXT"}
    assert len(find_files(folder / "**" / "*.[tT]*[tT]").files) == 3
    assert names(find_files(folder / "[lo]*.txt")) == {"linked.txt", "own.txt"}


def test_relative_patterns(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    assert [str(path) for path in find_files("my [2024] texts/ow*").files] == ["my [2024] texts/own.txt"]
    assert names(find_files("elsewhere/../elsewhere/*.txt")) == {"far.txt"}


def test_two_cycles_of_links_end(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    for name in ("a", "b"):
        for other in ("a", "b", "."):
            (tmp_path / name / f"to_{other.replace('.', 'root')}").symlink_to(tmp_path / other)
    (tmp_path / "b" / "x.txt").write_text("x")
    assert len(find_files(tmp_path, TEXT).files) == 1
    assert len(find_files(tmp_path / "**" / "*.txt").files) == 1


def test_a_file_that_is_named_is_taken_whatever_it_is_called(folder):
    assert find_files(folder / "._own.txt", TEXT).files == [folder / "._own.txt"]
    assert find_files(folder / "notes.pdf", TEXT).files == [folder / "notes.pdf"]


def test_names_that_mean_nothing(folder):
    with pytest.raises(FileNotFoundError, match=r"gone.txt is a link to .*nowhere.txt, which does not exist"):
        find_files(folder / "gone.txt")
    os.mkfifo(folder / "pipe.txt")
    with pytest.raises(FileNotFoundError, match="pipe.txt is neither a file nor a folder"):
        find_files(folder / "pipe.txt")
    assert find_files(folder, TEXT).left_out["not a file"] == [folder / "pipe.txt"]
    with pytest.raises(
        FileNotFoundError, match=r"data.files: no text file at .*__MACOSX/\.\* \(0 files; left out"
    ):
        (folder / "__MACOSX" / ".x").mkdir()
        text_files([folder / "__MACOSX" / ".*"], "data.files", print)
    with pytest.raises(FileNotFoundError, match=r"no text file at .*\[xyz\].txt \(\[ \] in a pattern"):
        text_files([folder / "[xyz].txt"], "data.files", print)


def test_every_reader_of_folders_uses_the_same_list(folder, tmp_path, capsys):
    texts = {"own", "linked", "deep"}
    source = SourceConfig(name="s", kind="text", path=str(folder))
    assert {item.text for item in read_source(source)} == texts
    assert {
        item.text
        for item in read_source(SourceConfig(name="s", kind="text", path=str(folder / "**" / "*.*xt")))
    } == {
        "own",
        "linked",
    }
    assert set(read_documents([folder], 0.1)) == texts
    assert "3 files; left out: broken link 1 (gone.txt)" in capsys.readouterr().out
    assert len(text_files([folder, "bundled"], "data.files", print)) == 3 + len(bundled_files())


def test_a_run_and_a_segment_may_name_a_folder(folder, tmp_path, monkeypatch):
    for path in (folder / "own.txt", folder / "linked.txt", folder / "part" / "deep.TXT"):
        path.write_text(f"{path.name} holds some words " * 20)
    config = load_config("pilot_smoke", ["data=bytes"]).data
    config.files, config.cache_dir = (str(folder),), str(tmp_path / "cache")
    lines = []
    corpus = load_corpus(config, lines.append)
    found = {entry["name"] for entry in corpus.provenance["files"]}
    assert len(found) == 3 and {"linked.txt", "deep.TXT"} < found
    assert len(lines) == 1 and "3 files; left out: broken link 1 (gone.txt)" in lines[0]
    monkeypatch.setenv("NESTED_LEARNING_CACHE", str(tmp_path / "cache"))
    tokens = Segment(name="a", files=(str(folder),)).tokens(ByteTokenizer(), config.valid_fraction)
    assert tokens.tolist() == corpus.valid.tolist()


def test_processing_says_what_it_takes(folder, tmp_path):
    from nested_learning.data import MixtureConfig

    lines = []
    mixture = MixtureConfig(sources=(SourceConfig(name="s", kind="text", path=str(folder)),), valid_share=0)
    job = ProcessingJob(
        mixture=mixture, tokenizer=ByteTokenizer(), folder=tmp_path / "out", progress=False, log=lines.append
    )
    manifest = process_mixture(job)
    assert manifest["sources"]["s"]["splits"]["train"]["documents"] == 3
    assert lines[0].startswith("s: 3 files; left out: broken link 1 (gone.txt)")


def test_endings_in_capitals_are_read_as_what_they_are(tmp_path):
    import gzip

    (tmp_path / "A.JSONL.GZ").write_bytes(gzip.compress(json.dumps({"text": "a"}).encode()))
    source = SourceConfig(name="s", kind="jsonl", path=str(tmp_path))
    assert [file.name for file in source_files(source)] == ["A.JSONL.GZ"]
    assert [item.text for item in read_source(source)] == ["a"]


def test_droppings_are_no_results(tmp_path):
    for name in ("b.json", "a.json", "._a.json"):
        (tmp_path / name).write_text("{}")
    assert [path.name for path in result_files([tmp_path])] == ["a.json", "b.json"]
