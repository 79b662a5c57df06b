"""What may be in the files of a checkpoint: nothing is run, and damage is one line that names the file."""

import io
import json
import os
import pickle
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from nested_learning.commands import nl
from nested_learning.data.corpus import Corpus
from nested_learning.data.tokenizer import ByteTokenizer
from nested_learning.models.lm import HopeLM
from nested_learning.runtime import set_seed
from nested_learning.train.checkpoint import (
    CheckpointError,
    CheckpointStore,
    load_checkpoint,
    read_checkpoint,
)
from nested_learning.train.checkpoint.manifest import write_manifest
from nested_learning.train.checkpointer import _restore_random_state
from nested_learning.train.config import run_config
from nested_learning.train.strategy import OneProcess
from nested_learning.train.trainer import Trainer

FILES = ("run.pt", ".metadata", "random_00000.pt", "__0_0.distcp", "manifest.json")
PICKLED = FILES[:4]


def trainer_in(folder, resume=None, text=b"the quick brown fox jumps over the lazy dog. "):
    """A trainer of a small HopeLM that saves after steps 2 and 4."""
    tokens = np.frombuffer(text * 20, dtype=np.uint8).astype(np.uint16)
    corpus = Corpus(
        train=tokens[:600],
        valid=tokens[600:],
        tokenizer=ByteTokenizer(),
        unigram_entropy=2.9,
        bytes_per_token=1.0,
        provenance={},
    )
    train = {"steps": 4, "seq_len": 12, "batch_size": 2, "save_every": 2, "eval_every": 2, "keep_last": 3}
    config = run_config(
        {
            "name": "run",
            "model": {"vocab_size": 257, "dim": 16, "num_layers": 1, "num_heads": 2},
            "logging": {"progress": False},
            "train": {**train, "eval_batches": 1, "output_dir": str(folder), "device": "cpu"},
        }
    )
    config.run_dir.mkdir(parents=True, exist_ok=True)
    set_seed(config.seed)
    return Trainer(config, HopeLM(config.model), corpus, OneProcess(), resume)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    trainer_in(folder).fit()
    return folder / "run"


@pytest.fixture
def checkpoint(trained, tmp_path):
    """The last of two checkpoints of a run."""
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run" / "checkpoints" / "step_00000004"


def errors_of(checkpoint):
    """What evaluation and resuming say, after it is known to be one line of ours."""
    run, found = checkpoint.parents[1], []
    for read in (
        lambda: load_checkpoint(run),
        lambda: trainer_in(run.parent, checkpoint),
        lambda: CheckpointStore(checkpoint.parent, 3).newest_whole(),
    ):
        try:
            read()
        except CheckpointError as error:
            assert "\n" not in str(error)
            found.append(str(error))
    return found


def restore(checkpoint):
    """Read the random states only."""
    _restore_random_state(checkpoint / "random_00000.pt")


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def saved(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def test_the_payload_works(tmp_path):
    pickle.loads(pickle.dumps(Payload(tmp_path / "ran")))
    assert (tmp_path / "ran").is_dir()


@pytest.mark.parametrize("wrapped", [pickle.dumps, saved])
@pytest.mark.parametrize("name", FILES)
def test_no_file_of_a_checkpoint_can_run_code(checkpoint, tmp_path, name, wrapped):
    (checkpoint / name).write_bytes(wrapped(Payload(tmp_path / "ran")))
    if name != "manifest.json":
        write_manifest(checkpoint)
    errors = errors_of(checkpoint)
    assert not (tmp_path / "ran").exists()
    assert len(errors) == (1 if name == "random_00000.pt" else 2)
    assert all(name in error for error in errors)


def test_the_index_cannot_run_code(checkpoint, tmp_path):
    (checkpoint.parent / "index.json").write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    assert errors_of(checkpoint) == []
    assert not (tmp_path / "ran").exists()


def metadata_of(checkpoint):
    return pickle.loads((checkpoint / ".metadata").read_bytes())


def put_metadata(checkpoint, metadata):
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    write_manifest(checkpoint)


def in_planner_data(metadata, payload):
    metadata.planner_data = payload


def in_a_tensors_place(metadata, payload):
    metadata.state_dict_metadata["model/embedding.weight"] = payload


def as_a_key(metadata, payload):
    metadata.storage_data[payload] = 1


@pytest.mark.parametrize("hide", [in_planner_data, in_a_tensors_place, as_a_key])
def test_a_payload_inside_of_the_right_metadata_is_not_run(checkpoint, tmp_path, hide):
    metadata = metadata_of(checkpoint)
    hide(metadata, Payload(tmp_path / "ran"))
    put_metadata(checkpoint, metadata)
    errors = errors_of(checkpoint)
    assert not (tmp_path / "ran").exists()
    assert len(errors) == 2 and all(".metadata" in error and "posix.mkdir" in error for error in errors)


def test_a_payload_in_place_of_a_tensor_is_not_run(checkpoint, tmp_path):
    content = saved(Payload(tmp_path / "ran")) + b"\0" * 20_000
    (checkpoint / "__0_0.distcp").write_bytes(content)
    metadata = metadata_of(checkpoint)
    for place in metadata.storage_data.values():
        place.offset, place.length = 0, len(content)
    put_metadata(checkpoint, metadata)
    errors = errors_of(checkpoint)
    assert not (tmp_path / "ran").exists()
    assert len(errors) == 2 and all("__0_0.distcp" in error for error in errors)


@pytest.mark.parametrize("name", ["run.pt", "random_00000.pt"])
def test_a_payload_among_plain_values_is_not_run(checkpoint, tmp_path, name):
    values = torch.load(checkpoint / name, weights_only=True)
    torch.save({**values, "metrics": Payload(tmp_path / "ran")}, checkpoint / name)
    write_manifest(checkpoint)
    errors = errors_of(checkpoint)
    assert not (tmp_path / "ran").exists()
    assert errors and all(name in e and "more than tensors and plain values" in e for e in errors)


def replaced(content, kind):
    texts = {"list": b"[]", "mapping": b"{}", "null": b"null", "empty": b"", "deep": b"[" * 100_000}
    values = {"saved list": [], "saved mapping": {}, "saved None": None, "saved tensor": torch.ones(2)}
    if kind == "half":
        return content[: len(content) // 2]
    return texts[kind] if kind in texts else saved(values[kind])


KINDS = ("empty", "half", "list", "mapping", "null", "deep")
SAVED = ("saved list", "saved mapping", "saved None", "saved tensor")


@pytest.mark.parametrize("kind", [*KINDS, *SAVED])
@pytest.mark.parametrize("name", FILES)
def test_a_replaced_file_is_named(checkpoint, name, kind):
    (checkpoint / name).write_bytes(replaced((checkpoint / name).read_bytes(), kind))
    with pytest.raises(CheckpointError, match=name):
        read_checkpoint(checkpoint)
    if name != "manifest.json":
        write_manifest(checkpoint)  # what is read is found to be wrong, not its checksum
        with pytest.raises(CheckpointError, match=name) as error:
            read_checkpoint(checkpoint) if name != "random_00000.pt" else restore(checkpoint)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_found_by_the_checksum_and_never_more_than_an_error_of_ours(checkpoint, name):
    draw, whole = random.Random(name), (checkpoint / name).read_bytes()
    for _ in range(3):
        content = bytearray(whole)
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        (checkpoint / name).write_bytes(content)
        if name != "manifest.json":
            with pytest.raises(CheckpointError, match=f"corrupt: {name} does not match its checksum"):
                read_checkpoint(checkpoint)
            write_manifest(checkpoint)
        errors_of(checkpoint)


@pytest.mark.parametrize(
    "key", ["version", "step", "optimizer", "loader", "tokenizer", "config", "metrics", "text"]
)
def test_wrong_values_in_the_description_of_the_run(checkpoint, key):
    run = torch.load(checkpoint / "run.pt", weights_only=True)
    for value in (None, [], b"x"):
        torch.save({**run, key: value}, checkpoint / "run.pt")
        write_manifest(checkpoint)
        errors = errors_of(checkpoint)
        assert errors and all(str(checkpoint) in error for error in errors)
    if key != "text":  # earlier releases did not write it
        torch.save({k: v for k, v in run.items() if k != key}, checkpoint / "run.pt")
        write_manifest(checkpoint)
        with pytest.raises(CheckpointError, match=r"run\.pt .*(lacks|format version)"):
            read_checkpoint(checkpoint)


@pytest.mark.parametrize(
    "section, key, value",
    [
        ("config", "model", []),
        ("config", "model", {"stranger": 1}),
        ("config", "seed", {}),
        ("config", "seed", None),
        ("tokenizer", "kind", "sentencepiece"),
        ("tokenizer", "kind", []),
        ("optimizer", "groups", {}),
        ("optimizer", "groups", [1]),
        ("optimizer", "plain", {"x": 1}),
        ("optimizer", "plain", []),
        ("loader", "used", "x"),
        ("loader", "used", None),
    ],
)
def test_wrong_values_inside_of_it(checkpoint, section, key, value):
    run = torch.load(checkpoint / "run.pt", weights_only=True)
    run[section][key] = value
    torch.save(run, checkpoint / "run.pt")
    write_manifest(checkpoint)
    errors = errors_of(checkpoint)
    assert errors and all(str(checkpoint) in error for error in errors)


def test_a_configuration_that_is_not_allowed_names_the_checkpoint_and_the_key(checkpoint):
    run = torch.load(checkpoint / "run.pt", weights_only=True)
    run["config"]["model"]["stranger"] = 1
    torch.save(run, checkpoint / "run.pt")
    write_manifest(checkpoint)
    with pytest.raises(CheckpointError, match=rf"{checkpoint}.* unknown key 'model.stranger'"):
        load_checkpoint(checkpoint)


@pytest.mark.parametrize("value", [None, [], {}, "x", -1, 1.5])
def test_wrong_values_in_random_states(checkpoint, value):
    state = torch.load(checkpoint / "random_00000.pt", weights_only=True)
    for key in ("python", "numpy", "torch"):
        torch.save({**state, key: value}, checkpoint / "random_00000.pt")
        write_manifest(checkpoint)
        with pytest.raises(CheckpointError, match="random_00000.pt holds no random states"):
            restore(checkpoint)


ENTRY = {"bytes": 1, "sha256": "0" * 64}


@pytest.mark.parametrize(
    "files, named",
    [
        ([], "AttributeError"),
        ({}, "run.pt is missing"),
        ({"run.pt": []}, "TypeError"),
        ({"run.pt": {"bytes": 1}}, "sha256"),
        ({"run.pt": ENTRY | {"bytes": "1"}}, "bytes of run.pt must be an integer of at least 0, got '1'"),
        ({"run.pt": ENTRY | {"bytes": True}}, "bytes of run.pt"),
        ({"run.pt": ENTRY | {"sha256": 7}}, "sha256 of run.pt must be 64 hexadecimal digits, got 7"),
        ({"../run.pt": ENTRY}, "'../run.pt' is not the name of a file in it"),
        ({"/etc/passwd": ENTRY}, "'/etc/passwd' is not"),
        ({"a/../../b": ENTRY}, "'a/../../b' is not"),
        ({"": ENTRY}, "'' is not"),
    ],
)
def test_a_manifest_is_not_believed(checkpoint, files, named):
    (checkpoint / "manifest.json").write_text(json.dumps({"files": files}))
    with pytest.raises(CheckpointError) as error:
        read_checkpoint(checkpoint)
    assert named in str(error.value) and str(checkpoint) in str(error.value)
    assert "\n" not in str(error.value)


def elsewhere(metadata):
    for place in metadata.storage_data.values():
        place.relative_path = "../step_00000002/__0_0.distcp"


def too_long(metadata):
    next(iter(metadata.storage_data.values())).length = 10**9


def too_large(metadata):
    entry = metadata.state_dict_metadata["model/embedding.weight"]
    entry.size = entry.chunks[0].sizes = torch.Size([2**40, 2**20])


def not_covered(metadata):
    metadata.state_dict_metadata["model/embedding.weight"].chunks = []


def negative(metadata):
    next(iter(metadata.storage_data.values())).offset = -5


def an_object(metadata):
    metadata.state_dict_metadata["model/embedding.weight"] = BytesStorageMetadata()


@pytest.mark.parametrize(
    "change, named",
    [
        (elsewhere, "'../step_00000002/__0_0.distcp' outside of the checkpoint"),
        (too_long, "__0_0.distcp has at least"),
        (too_large, "no room in the files"),
        (not_covered, "do not make"),
        (negative, "__0_0.distcp"),
        (an_object, "expected"),
    ],
)
def test_metadata_is_not_believed(checkpoint, change, named):
    metadata = metadata_of(checkpoint)
    change(metadata)
    put_metadata(checkpoint, metadata)
    errors = errors_of(checkpoint)
    assert len(errors) == 2 and all(".metadata" in error and named in error for error in errors), errors


def test_metadata_is_read_as_torch_reads_it(checkpoint):
    from nested_learning.train.checkpoint.metadata import read_metadata

    ours, theirs = read_metadata(checkpoint), metadata_of(checkpoint)
    assert ours.state_dict_metadata == theirs.state_dict_metadata
    assert ours.storage_data == theirs.storage_data


@pytest.mark.parametrize(
    "content",
    [
        *("", '{"latest": "step_0', "[]", "{}", "null", "7", '"x"', '{"latest": 3}', '{"latest": ["a"]}'),
        *('{"latest": "../../elsewhere"}', '{"latest": "/tmp"}', '{"best": "../x", "best_loss": 1}'),
        *('{"best": "step_00000002"}', '{"best": "step_00000002", "best_loss": "x"}', "[" * 100_000),
        *('{"latest": "step_00000009"}', '{"latest": "index.json"}'),
    ],
)
def test_an_index_is_not_believed_and_made_anew(checkpoint, tmp_path, content):
    shutil.copytree(checkpoint, tmp_path / "elsewhere")
    store = CheckpointStore(checkpoint.parent, 3)
    best, index = store.best(), checkpoint.parent / "index.json"
    (checkpoint.parent / "index.json").write_text(content)
    assert store.latest() == checkpoint == store.newest_whole()
    assert content.startswith('{"latest": "step_00000009"') or content == "{}" or store.best() == best
    store.begin(5)
    store.commit(5, {})
    assert json.loads(index.read_text())["latest"] == "step_00000005"


def test_a_lost_index_is_made_from_the_checkpoints(checkpoint):
    for folder, loss in ((checkpoint, 3.0), (checkpoint.with_name("step_00000002"), 2.0)):
        run = torch.load(folder / "run.pt", weights_only=True)
        torch.save({**run, "metrics": {"valid_loss": loss}}, folder / "run.pt")
        write_manifest(folder)
    os.utime(checkpoint / "manifest.json")
    (checkpoint.parent / "index.json").unlink()
    store = CheckpointStore(checkpoint.parent, 1)
    assert store.best().name == "step_00000002" and store.latest() == checkpoint
    store.begin(5)
    store.commit(5, {"valid_loss": 2.5})
    assert sorted(p.name for p in checkpoint.parent.glob("step*")) == ["step_00000002", "step_00000005"]


DROPPINGS = (".DS_Store", "._run.pt", "run.pt~", "random_00001.pt")


@pytest.mark.parametrize("name", DROPPINGS)
def test_a_file_of_others_is_named_and_left_alone(checkpoint, capfd, tmp_path, name):
    (checkpoint / name).write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    assert errors_of(checkpoint) == []
    assert not (tmp_path / "ran").exists()
    assert f"in checkpoint {checkpoint}, not of it and left alone: {name}" in capfd.readouterr().err
    assert nl.main(["verify-checkpoint", str(checkpoint)]) == 0
    assert f"{name} is not of this checkpoint" in capfd.readouterr().out
    (checkpoint.parent / name).write_bytes(b"?")
    (checkpoint.parent / "step_notes.txt").write_text("?")
    assert errors_of(checkpoint) == []


@pytest.mark.parametrize("name", [*FILES, "__0_0.distcp", "index.json"])
def test_a_part_of_a_checkpoint_is_not_taken_for_one(checkpoint, capsys, name):
    folder = checkpoint.parent if name == "index.json" else checkpoint
    with pytest.raises(CheckpointError, match=f"{name} is a part of .*; give its folder, {folder}$"):
        load_checkpoint(folder / name)
    assert nl.main(["export", str(folder / name)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_checkpoint_of_the_first_format(tmp_path, checkpoint):
    old = Path(shutil.copytree(checkpoint.parents[1], tmp_path / "old")) / "checkpoints"
    for folder in old.glob("step_*"):
        shutil.rmtree(folder)
    torch.save({"version": 1, "step": 100, "model": {}}, old / "step_00000100.pt")
    (old / "index.json").write_text(json.dumps({"latest": "step_00000100.pt"}))
    for read in (
        lambda: load_checkpoint(old / "step_00000100.pt"),
        lambda: CheckpointStore(old, 1).newest_whole(),
        lambda: load_checkpoint(tmp_path / "old"),
    ):
        with pytest.raises(CheckpointError, match=r"step_00000100.pt is a checkpoint of format 1"):
            read()
    CheckpointStore(old, 1).clear()
    assert list(old.iterdir()) == []
