import json
import random

import numpy as np
import pytest
import torch
from torch.optim import AdamW

from nested_learning.commands import nl
from nested_learning.data.tokenizer import ByteTokenizer
from nested_learning.models.lm import HopeLM
from nested_learning.runtime import random_state, set_random_state
from nested_learning.train.checkpoint import (
    CheckpointError,
    CheckpointStore,
    export_checkpoint,
    find_checkpoint,
    load_checkpoint,
    read_checkpoint,
    verify,
    write_atomic,
)
from nested_learning.train.checkpoint.manifest import write_manifest
from nested_learning.train.checkpoint.tensors import pack, write_tensors
from nested_learning.train.config import run_config


@pytest.fixture
def saved(make_trainer):
    trainer = make_trainer(steps=4, save_every=2)
    trainer.fit()
    return trainer


def hope_checkpoint(folder, vocab_size=257, weights_vocab=None, drop=None):
    """A checkpoint folder of a small HopeLM with a byte tokenizer."""
    config = run_config({"model": {"vocab_size": vocab_size, "dim": 16, "num_layers": 1, "num_heads": 2}})
    wide = run_config({"model": {**config.to_dict()["model"], "vocab_size": weights_vocab or vocab_size}})
    torch.manual_seed(3)
    model = HopeLM(wide.model)
    folder.mkdir()
    tensors, values = pack(model, AdamW(model.parameters()))
    if drop is not None:
        tensors["model/stranger"] = tensors.pop(f"model/{drop}")
    write_tensors(folder, tensors)
    write_run(folder, tokenizer=ByteTokenizer().state(), config=config.to_dict(), optimizer=values)
    return model, config


def write_run(folder, **changes):
    """Replace parts of `run.pt`, with a manifest that fits."""
    run = {"version": 2, "step": 5, "loader": {}, "metrics": {}}
    if (folder / "run.pt").exists():
        run = torch.load(folder / "run.pt", weights_only=True)
    write_atomic(folder / "run.pt", {**run, **changes})
    (folder / "manifest.json").unlink(missing_ok=True)
    write_manifest(folder)


def run_of(folder):
    return torch.load(folder / "run.pt", weights_only=True)


def test_model_tokenizer_and_config_come_back(tmp_path):
    model, config = hope_checkpoint(tmp_path / "a")
    loaded, tokenizer, loaded_config = load_checkpoint(tmp_path / "a")
    tokens = torch.tensor([tokenizer.encode("to be or not to be")])
    assert torch.equal(model.eval()(tokens)[0], loaded(tokens)[0])
    assert loaded_config == config and tokenizer.fingerprint == "byte"
    assert not loaded.training and all(p.requires_grad for p in loaded.parameters())


def test_tokenizer_and_weights_of_different_vocabularies(tmp_path):
    hope_checkpoint(tmp_path / "a", vocab_size=300)
    with pytest.raises(CheckpointError, match="tokenizer has 257 tokens but its weights are for 300"):
        load_checkpoint(tmp_path / "a")
    hope_checkpoint(tmp_path / "b", weights_vocab=300)
    with pytest.raises(CheckpointError, match=r"weights of checkpoint .*b do not fit its model"):
        load_checkpoint(tmp_path / "b")


def test_a_missing_or_unexpected_weight_is_an_error(tmp_path):
    hope_checkpoint(tmp_path / "a", drop="norm.weight")
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(tmp_path / "a")
    assert "norm.weight" in str(error.value) and "stranger" in str(error.value)


def damage(folder, kind):
    file = folder / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    if kind == "flipped":
        content[len(content) // 2] ^= 0x10
    if kind == "missing":
        file.unlink()
    else:
        file.write_bytes({"truncated": content[: len(content) // 2], "empty": b""}.get(kind, content))


@pytest.mark.parametrize(
    "kind, named",
    [
        ("truncated", r"__0_0.distcp has \d+ bytes, was written with \d+"),
        ("empty", "__0_0.distcp has 0 bytes"),
        ("flipped", "__0_0.distcp does not match its checksum"),
        ("missing", "__0_0.distcp is missing"),
    ],
)
def test_damage_is_found_and_named(saved, make_trainer, capsys, kind, named):
    assert verify(saved.store.latest()) == []
    assert nl.main(["verify-checkpoint", str(saved.config.run_dir)]) == 0
    damage(saved.store.latest(), kind)
    with pytest.raises(CheckpointError, match=f"corrupt: {named}"):
        read_checkpoint(saved.store.latest())
    with pytest.raises(CheckpointError, match=f"corrupt: {named}"):
        make_trainer(resume=saved.store.latest())
    capsys.readouterr()
    assert nl.main(["verify-checkpoint", str(saved.config.run_dir)]) == 1
    assert named.split(" ")[0] in capsys.readouterr().out


def test_no_checkpoint(tmp_path, capsys):
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        read_checkpoint(tmp_path)
    assert nl.main(["verify-checkpoint", str(tmp_path)]) == 2
    assert "no checkpoint at" in capsys.readouterr().err


def test_a_directory_means_its_latest_checkpoint(saved):
    assert find_checkpoint(saved.config.run_dir).name == "step_00000004"
    assert find_checkpoint(saved.config.run_dir / "checkpoints").name == "step_00000004"
    assert find_checkpoint(saved.store.latest()) == saved.store.latest()


def test_another_format_version(saved):
    write_run(saved.store.latest(), version=99)
    with pytest.raises(CheckpointError, match="format version 99; this code reads 2"):
        read_checkpoint(saved.store.latest())


def test_export_is_one_file_that_says_what_it_is(tmp_path, capsys):
    model, config = hope_checkpoint(tmp_path / "a")
    assert nl.main(["export", str(tmp_path / "a"), "--output", str(tmp_path / "b.safetensors")]) == 0
    loaded, tokenizer, loaded_config = load_checkpoint(tmp_path / "b.safetensors")
    assert loaded_config == config and tokenizer.fingerprint == "byte"
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    from safetensors.torch import load_file

    assert load_file(tmp_path / "b.safetensors").keys() == model.state_dict().keys()
    assert nl.main(["export", str(tmp_path / "a"), "--output", str(tmp_path / "b.bin")]) == 2
    assert "must end in .safetensors" in capsys.readouterr().err


def test_an_exported_file_keeps_a_sentencepiece_tokenizer(tmp_path):
    hope_checkpoint(tmp_path / "a")
    write_run(tmp_path / "a", tokenizer={"kind": "sentencepiece", "model": bytes(range(256))})
    exported = read_checkpoint(export_checkpoint(tmp_path / "a"))
    assert exported["tokenizer"] == {"kind": "sentencepiece", "model": bytes(range(256))}


def test_a_file_that_is_not_an_export(tmp_path, saved, make_trainer):
    (tmp_path / "x.safetensors").write_bytes(b"0" * 100)
    with pytest.raises(CheckpointError, match="truncated or corrupt"):
        load_checkpoint(tmp_path / "x.safetensors")
    from safetensors.torch import save_file

    save_file({"a": torch.ones(2)}, tmp_path / "y.safetensors")
    with pytest.raises(CheckpointError, match="was not written by nl export"):
        load_checkpoint(tmp_path / "y.safetensors")
    with pytest.raises(CheckpointError, match="an exported file holds no optimizer state"):
        make_trainer(resume=export_checkpoint(saved.config.run_dir))


def put(store, step, loss=None):
    store.begin(step)
    store.commit(step, {} if loss is None else {"valid_loss": loss})


def test_keeps_the_newest_and_the_best(tmp_path):
    store = CheckpointStore(tmp_path, keep_last=2)
    for step, loss in enumerate([5.0, 3.0, 4.0, 4.5, 4.2], start=1):
        put(store, step, loss)
    assert sorted(p.name for p in tmp_path.glob("step*")) == [f"step_0000000{i}" for i in (2, 4, 5)]
    index = json.loads((tmp_path / "index.json").read_text())
    assert index == {"best": "step_00000002", "best_loss": 3.0, "latest": "step_00000005"}


def test_going_back_to_an_earlier_step_keeps_what_is_written_now(tmp_path):
    store = CheckpointStore(tmp_path, keep_last=1)
    put(store, 9)
    put(store, 4)
    assert store.latest() == tmp_path / "step_00000004"
    assert [p.name for p in tmp_path.glob("step*")] == ["step_00000004"]
    put(store, 4)
    assert [p.name for p in tmp_path.glob("step*")] == ["step_00000004"]


def test_killed_between_the_renames(tmp_path):
    store = CheckpointStore(tmp_path, keep_last=3)
    put(store, 1)
    put(store, 2)
    (tmp_path / "step_00000002").rename(tmp_path / "step_00000002.old.tmp")  # to be replaced
    store.begin(3)  # half written
    assert store.latest() == tmp_path / "step_00000001"
    store.clean()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["index.json", "step_00000001"]


def test_a_failed_write_leaves_the_former_file(tmp_path, monkeypatch):
    path = tmp_path / "a.pt"
    write_atomic(path, b"old")
    monkeypatch.setattr(torch, "save", lambda value, file: (file.write(b"ha"), 1 / 0))
    with pytest.raises(ZeroDivisionError):
        write_atomic(path, {"new": 1})
    assert path.read_bytes() == b"old"
    CheckpointStore(tmp_path, 1).clean()
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "section, key, value",
    [("optim", "lr", 0.5), ("model", "dim", 64), ("train", "inner", "online"), (None, "seed", 7)],
)
def test_resuming_another_run_names_the_difference(saved, make_trainer, section, key, value):
    config = run_of(saved.store.latest())["config"]
    (config[section] if section else config)[key] = value
    config["adapt"]["chunk_size"] = 4  # makes no difference to a run that does not adapt
    write_run(saved.store.latest(), config=config)
    with pytest.raises(CheckpointError, match=f"{key} is .*, was '?{value}"):
        make_trainer(resume=saved.store.latest())


def test_resuming_with_another_optimizer_layout(saved, make_trainer):
    optimizer = run_of(saved.store.latest())["optimizer"]
    optimizer["groups"][0]["params"].reverse()
    optimizer["groups"].reverse()
    write_run(saved.store.latest(), optimizer=optimizer)
    with pytest.raises(CheckpointError, match="other parameter groups"):
        make_trainer(resume=saved.store.latest())


def test_resuming_with_another_sequence_length(saved, make_trainer):
    with pytest.raises(CheckpointError, match="seq_len"):
        make_trainer(resume=saved.store.latest(), seq_len=10)


def test_random_states_come_back(tmp_path):
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    np.random.normal()  # leaves a cached second value
    torch.save(random_state(), tmp_path / "r")

    def draw():
        return random.random(), np.random.normal(), torch.rand(3).tolist()

    first = draw()
    set_random_state(torch.load(tmp_path / "r", weights_only=True))
    assert draw() == first
