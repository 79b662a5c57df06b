"""Processing: what is written against the rules by hand; the same bytes whatever the workers and kills."""

import errno
import gzip
import json
import os
import random
import signal
import time
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from texts import document, documents

from nested_learning.data import ByteTokenizer, ShardFolder, open_corpus
from nested_learning.data.config import DedupConfig, FilterConfig, MixtureConfig, SourceConfig
from nested_learning.data.pipeline import process as process_module
from nested_learning.data.pipeline.process import ProcessingJob, process_mixture, split_of
from nested_learning.data.pipeline.sources import SourceError
from nested_learning.data.pipeline.store import DiskFullError, OtherSettingsError, ShardStore, clear_folder
from nested_learning.data.pipeline.validate import check_shards

EOS = ByteTokenizer.eos_id


def quiet(line):
    pass


def lines(texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


@pytest.fixture
def mixture(tmp_path):
    """Two sources with copies, near copies, rejects and broken records."""
    (tmp_path / "a").mkdir()
    near = document(3, 400)
    texts = [*documents(60), document(7), near, near.replace("Line 3-5", "Line 3-x"), "too short"]
    (tmp_path / "a" / "one.jsonl").write_bytes(lines(texts[:30]) + b"{broken\n" + lines([""]))
    (tmp_path / "a" / "two.jsonl.gz").write_bytes(gzip.compress(lines(texts[30:])))
    (tmp_path / "b.txt").write_text("\n\f\n".join([document(5), *documents(25, first=100, num_words=300)]))
    return MixtureConfig(
        sources=(
            SourceConfig(name="a", kind="jsonl", path=str(tmp_path / "a"), filter=FilterConfig(min_chars=20)),
            SourceConfig(name="b", kind="text", path=str(tmp_path / "b.txt"), weight=3.0),
        ),
        valid_share=0.2,
        long_share=0.3,
        long_chars=1500,
        shard_tokens=5000,
    )


def job(mixture, folder, **options):
    settings = {"tokenizer": ByteTokenizer(), "progress": False, "log": quiet} | options
    return ProcessingJob(mixture=mixture, folder=Path(folder), **settings)


def content(folder):
    """Every file but the provenance, which holds times."""
    files = [path for path in Path(folder).rglob("*") if path.is_file() and path.name != "provenance.json"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture
def small_blocks(monkeypatch):
    """Many blocks and many commits from little text."""
    monkeypatch.setattr(process_module, "BLOCK_CHARS", 1500)
    monkeypatch.setattr(process_module, "COMMIT_CHARS", 4000)


def texts_of(tokens):
    """Documents of a split, cut at the end token."""
    pieces = bytes(255 if t == EOS else t for t in tokens[:].tolist()).split(b"\xff")
    return [piece.decode() for piece in pieces[:-1]]


def test_what_is_written(mixture, tmp_path, small_blocks):
    manifest = process_mixture(job(mixture, tmp_path / "out"))
    dropped = {"bad_json": 1, "empty": 1, "exact_copy": 1, "near_copy": 1, "too_short": 1}
    assert manifest["sources"]["a"]["dropped"] == dropped
    assert manifest["sources"]["b"]["dropped"] == {"exact_copy": 1}  # a copy of a text in the other source
    assert manifest["sources"]["a"]["records"] == 66
    assert "one.jsonl, line 31: not JSON" in manifest["sources"]["a"]["examples"]["bad_json"]
    folder = ShardFolder(tmp_path / "out")
    expected = {"a": [*documents(60), document(3, 400)], "b": documents(25, first=100, num_words=300)}
    for name, texts in expected.items():
        for split in ("train", "valid", "long"):
            wanted = [
                t for t in texts if split_of(process_module.document_digest(t), len(t), mixture) == split
            ]
            if (tokens := folder.open(split).get(name)) is None:
                assert not wanted
                continue
            assert texts_of(tokens) == wanted
            ends = [start - 1 for start in tokens.starts[1:].tolist()] + [len(tokens) - 1]
            assert all(tokens[end : end + 1] == EOS for end in ends)
            counts = manifest["sources"][name]["splits"][split]
            assert counts["bytes"] == sum(len(t.encode()) for t in wanted)
            assert counts["shards"] == [5000] * (len(tokens) // 5000) + [len(tokens) % 5000]
    assert not list((tmp_path / "out").rglob("*.part"))
    assert check_shards(folder) == []


def test_provenance_names_files_counts_and_time(mixture, tmp_path):
    process_mixture(job(mixture, tmp_path / "out"))
    found = json.loads((tmp_path / "out" / "provenance.json").read_text())
    import hashlib

    digest = hashlib.sha256((tmp_path / "b.txt").read_bytes()).hexdigest()
    assert found["files"]["b"] == {str(tmp_path / "b.txt"): digest}
    assert found["sources"]["b"]["read"] == 26 and found["sources"]["b"]["seconds"] > 0


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_change_nothing(mixture, tmp_path, small_blocks, workers):
    process_mixture(job(mixture, tmp_path / "alone"))
    process_mixture(job(mixture, tmp_path / "many", workers=workers))
    assert content(tmp_path / "alone") == content(tmp_path / "many")


def run_and_die(mixture, folder, workers, where, count):
    """In a child: process, and kill the process at the `count`-th call of a function."""
    owner, name = where
    original, calls = getattr(owner, name), iter(range(10**9))

    def deadly(*arguments, **options):
        if next(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **options)

    setattr(owner, name, deadly)
    process_mixture(job(mixture, folder, workers=workers))


@pytest.mark.thorough
@pytest.mark.parametrize(
    "where", [(os, "fsync"), (Path, "rename"), (Path, "replace"), (ShardStore, "append")]
)
def test_a_kill_at_any_step_changes_nothing(mixture, tmp_path, small_blocks, where):
    """Killed before the 1st, 4th, 9th, … such step since the last start, until one start gets to the end."""
    process_mixture(job(mixture, tmp_path / "whole"))
    kills = 0
    for count in (0, 3, 8, 2, 15, 5, 30, 60, 10**6):
        child = get_context("fork").Process(
            target=run_and_die, args=(mixture, tmp_path / "killed", 0, where, count)
        )
        child.start()
        child.join()
        assert child.exitcode in (0, -signal.SIGKILL)
        if child.exitcode == 0:
            break
        assert not (tmp_path / "killed" / "mixture.json").exists()
        kills += 1
    assert kills >= 3
    assert content(tmp_path / "killed") == content(tmp_path / "whole")


def killed_at_random(mixture, folder, kills, seconds, rng):
    """Start, kill after a random time, start again …; how many kills hit a running process."""
    hits = 0
    while hits < kills:
        child = get_context("fork").Process(target=process_mixture, args=(job(mixture, folder, workers=2),))
        child.start()
        time.sleep(rng.uniform(0.05, seconds))
        if child.exitcode is not None:
            return hits
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        hits += 1
    process_mixture(job(mixture, folder, workers=2))
    return hits


@pytest.fixture
def larger(mixture, tmp_path):
    (tmp_path / "c.jsonl").write_bytes(lines(documents(800, first=1000, num_words=300)))
    extra = SourceConfig(
        name="c", kind="jsonl", path=str(tmp_path / "c.jsonl"), filter=FilterConfig(language="en")
    )
    return replace(mixture, sources=(*mixture.sources, extra), shard_tokens=100_000)


@pytest.mark.thorough
def test_three_kills_at_random_moments_change_nothing(larger, tmp_path, monkeypatch):
    monkeypatch.setattr(process_module, "BLOCK_CHARS", 20_000)
    monkeypatch.setattr(process_module, "COMMIT_CHARS", 60_000)
    process_mixture(job(larger, tmp_path / "whole", workers=2))
    assert killed_at_random(larger, tmp_path / "killed", 3, 0.6, random.Random(0)) >= 1
    process_mixture(job(larger, tmp_path / "killed"))
    assert content(tmp_path / "killed") == content(tmp_path / "whole")


@pytest.mark.slow
def test_ten_kills_at_random_moments_change_nothing(larger, tmp_path, monkeypatch):
    monkeypatch.setattr(process_module, "BLOCK_CHARS", 5_000)
    monkeypatch.setattr(process_module, "COMMIT_CHARS", 20_000)
    start = time.monotonic()
    process_mixture(job(larger, tmp_path / "whole", workers=2))
    took = time.monotonic() - start
    for attempt in range(20):
        clear_folder(tmp_path / "killed")
        if killed_at_random(larger, tmp_path / "killed", 10, took / 6, random.Random(attempt)) == 10:
            break
    else:
        pytest.fail("no run survived ten kills")
    assert content(tmp_path / "killed") == content(tmp_path / "whole")


def test_workers_of_a_killed_process_end(larger, tmp_path):
    child = get_context("fork").Process(
        target=process_mixture, args=(job(larger, tmp_path / "out", workers=2),)
    )
    child.start()
    workers = []
    while len(workers) < 2 and child.is_alive():
        time.sleep(0.02)
        workers = Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    deadline = time.monotonic() + 30
    while any(running(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert workers and not any(running(pid) for pid in workers)


def running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] not in ("Z", "X")
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("after", [0, 1, 7, 40])
def test_a_full_disk_is_one_sentence_and_loses_nothing(mixture, tmp_path, small_blocks, monkeypatch, after):
    process_mixture(job(mixture, tmp_path / "whole"))
    calls, fsync = iter(range(10**9)), os.fsync

    def full(descriptor):
        if next(calls) >= after:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskFullError, match=r"no room to write in .*out \(No space left.*same command again"):
        process_mixture(job(mixture, tmp_path / "out"))
    assert not (tmp_path / "out" / "mixture.json").exists()
    assert not list((tmp_path / "out").rglob("*.tmp"))
    for path in (tmp_path / "out").rglob("*.bin"):  # what has its final name is whole
        assert path.read_bytes() == (tmp_path / "whole" / path.relative_to(tmp_path / "out")).read_bytes()
    monkeypatch.setattr(os, "fsync", fsync)
    process_mixture(job(mixture, tmp_path / "out"))
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_a_real_limit_of_file_size(mixture, tmp_path):
    """The system itself refuses to write on."""
    child = get_context("fork").Process(target=limited, args=(mixture, tmp_path / "out"))
    child.start()
    child.join()
    assert child.exitcode == 77
    process_mixture(job(mixture, tmp_path / "out"))
    process_mixture(job(mixture, tmp_path / "whole"))
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def limited(mixture, folder):
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, resource.RLIM_INFINITY))
    try:
        process_mixture(job(mixture, folder))
    except DiskFullError:
        os._exit(77)


def test_an_interrupted_source_goes_on(mixture, tmp_path, small_blocks, monkeypatch):
    process_mixture(job(mixture, tmp_path / "whole"))
    read = process_module.read_source

    def breaking(source, start):
        for number, item in enumerate(read(source, start)):
            if number == 17:
                raise SourceError("the line is down")
            yield item

    monkeypatch.setattr(process_module, "read_source", breaking)
    tries = 0
    while not (tmp_path / "out" / "mixture.json").exists():
        try:
            process_mixture(job(mixture, tmp_path / "out"))
        except SourceError:
            tries += 1
            assert tries < 20
    assert tries > 3
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_limits_count_records(mixture, tmp_path):
    cut = replace(mixture.sources[0], limit=32)
    manifest = process_mixture(job(replace(mixture, sources=(cut, mixture.sources[1])), tmp_path / "out"))
    assert manifest["sources"]["a"]["records"] == 32
    assert manifest["sources"]["a"]["dropped"] == {"bad_json": 1, "empty": 1}


def test_dedup_can_be_switched_off(mixture, tmp_path):
    off = replace(mixture, dedup=DedupConfig(exact=False, near=False))
    manifest = process_mixture(job(off, tmp_path / "out"))
    assert "exact_copy" not in manifest["sources"]["a"]["dropped"]
    assert check_shards(ShardFolder(tmp_path / "out")) == []  # equal texts are in the same split all the same


@pytest.mark.thorough
def test_one_enormous_document(tmp_path):
    text = "word and another word, " * 2_300_000  # 50 MB in one line
    (tmp_path / "x.jsonl").write_bytes(lines(["before " * 40, text, "after " * 40]))
    source = SourceConfig(name="x", kind="jsonl", path=str(tmp_path / "x.jsonl"))
    mixture = MixtureConfig(
        sources=(source,), valid_share=0, long_share=0, dedup=DedupConfig(near=False), shard_tokens=1 << 22
    )
    process_mixture(job(mixture, tmp_path / "out"))
    tokens = ShardFolder(tmp_path / "out").open("train")["x"]
    assert len(tokens.starts) == 3 and len(tokens) == len(text) + 280 + 240 + 3
    assert bytes(tokens[281 : 281 + len(text)].astype(np.uint8)) == text.encode()


def test_a_complete_folder_is_left_alone_and_other_settings_are_refused(mixture, tmp_path):
    process_mixture(job(mixture, tmp_path / "out"))
    before = content(tmp_path / "out")
    messages = []
    process_mixture(job(mixture, tmp_path / "out", log=messages.append))
    assert messages == [f"{tmp_path / 'out'} is complete already"] and content(tmp_path / "out") == before
    with pytest.raises(OtherSettingsError, match=r"seed is 1, was 0; use another folder"):
        process_mixture(job(replace(mixture, seed=1), tmp_path / "out"))


def test_a_run_with_changed_files_is_refused(mixture, tmp_path, small_blocks, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with pytest.raises(DiskFullError):
        process_mixture(job(mixture, tmp_path / "out"))
    monkeypatch.undo()
    run_until_killed = get_context("fork").Process(
        target=run_and_die, args=(mixture, tmp_path / "out", 0, (Path, "replace"), 1)
    )
    run_until_killed.start()
    run_until_killed.join()
    (tmp_path / "b.txt").write_text("something else")
    with pytest.raises(OtherSettingsError, match="files is"):
        process_mixture(job(mixture, tmp_path / "out"))


def test_nothing_left_for_training_is_an_error(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(lines(["tiny"]))
    source = SourceConfig(name="x", kind="jsonl", path=str(tmp_path / "x.jsonl"), filter=FilterConfig())
    with pytest.raises(ValueError, match="no document is left for training; dropped: {'too_short': 1}"):
        process_mixture(job(MixtureConfig(sources=(source,)), tmp_path / "out"))


def test_two_processes_do_not_write_to_one_folder(mixture, tmp_path):
    store = ShardStore(tmp_path / "out", {}, np.dtype("<u2"), 100)
    child = get_context("fork").Process(target=expect_refusal, args=(tmp_path / "out",))
    child.start()
    child.join()
    store.close()
    assert child.exitcode == 78


def expect_refusal(folder):
    try:
        ShardStore(folder, {}, np.dtype("<u2"), 100)
    except ValueError as error:
        os._exit(78 if f"is in use by process {os.getppid()} on" in str(error) else 1)


def test_clearing_spares_other_folders(mixture, tmp_path):
    with pytest.raises(ValueError, match="holds no shards"):
        clear_folder(tmp_path)
    process_mixture(job(mixture, tmp_path / "out"))
    clear_folder(tmp_path / "out")
    clear_folder(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_held_out_documents_never_meet_training(mixture, tmp_path):
    process_mixture(job(mixture, tmp_path / "out"))
    folder = ShardFolder(tmp_path / "out")
    seen = [
        bytes(row)
        for split in ("train", "valid", "long")
        for s in folder.open(split).values()
        for row in s.hashes
    ]
    assert len(seen) == len(set(seen)) == 86
    # a training document smuggled into the held-out hashes is found
    victim = tmp_path / "out" / "a" / "valid.hashes"
    data = bytearray(victim.read_bytes())
    data[:16] = (tmp_path / "out" / "b" / "train.hashes").read_bytes()[:16]
    victim.write_bytes(data)
    assert any("another SHA-256" in problem for problem in check_shards(folder))
    from nested_learning.data.pipeline.validate import overlap

    assert overlap(folder) == ["1 training documents of b are in the split valid"]


def test_splits_follow_their_shares():
    mixture = MixtureConfig(
        sources=(SourceConfig(name="x", kind="text", path="x"),),
        valid_share=0.1,
        long_share=0.3,
        long_chars=10,
    )
    digests = [process_module.document_digest(str(i)) for i in range(4000)]
    short = [split_of(digest, 9, mixture) for digest in digests]
    long = [split_of(digest, 10, mixture) for digest in digests]
    assert short.count("long") == 0 and abs(short.count("valid") - 400) < 80
    assert abs(long.count("long") - 1200) < 120 and abs(long.count("valid") - 400) < 80
    assert [split_of(d, 9, replace(mixture, seed=1)) for d in digests] != short


def test_corpus_of_shards(mixture, tmp_path):
    process_mixture(job(mixture, tmp_path / "out"))
    corpus, folder = open_corpus(tmp_path / "out"), ShardFolder(tmp_path / "out")
    assert corpus.train.weights == [1.0, 3.0] and corpus.tokenizer.fingerprint == "byte"
    train = [np.asarray(tokens[:]) for tokens in folder.open("train").values()]
    assert np.array_equal(corpus.train[:], np.concatenate(train))
    valid = np.concatenate([np.asarray(tokens[:]) for tokens in folder.open("valid").values()])
    share = sum(w * np.bincount(t, minlength=257) / len(t) for w, t in zip((1, 3), train, strict=True)) / 4
    smooth = share + share[share > 0].min()
    expected = -np.log((smooth / smooth.sum())[valid]).mean()
    assert corpus.unigram_entropy == pytest.approx(expected, rel=1e-9)
    assert corpus.bytes_per_token == (valid != EOS).sum() / len(valid)


def test_an_incomplete_folder_is_named(mixture, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no complete shards in .*out \(mixture.json is missing\)"):
        open_corpus(tmp_path / "out")
    process_mixture(job(mixture, tmp_path / "out"))
    file = tmp_path / "out" / "b" / "train-00000.bin"
    file.write_bytes(file.read_bytes()[:-2])
    with pytest.raises(ValueError, match=r"train-00000.bin has 4999 entries, mixture.json says 5000"):
        open_corpus(tmp_path / "out")
    file.unlink()
    with pytest.raises(FileNotFoundError, match="train-00000.bin is missing"):
        open_corpus(tmp_path / "out")
