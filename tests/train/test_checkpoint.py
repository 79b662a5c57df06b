import json
import random

import numpy as np
import pytest
import torch

from nested_learning.config import run_config
from nested_learning.data.tokenizer import ByteTokenizer
from nested_learning.models.lm import HopeLM
from nested_learning.train.checkpoint import (
    CheckpointError,
    CheckpointStore,
    find_checkpoint,
    load_checkpoint,
    read_checkpoint,
    write_atomic,
)
from nested_learning.train.random_state import random_state, set_random_state


@pytest.fixture
def saved(make_trainer):
    trainer = make_trainer(steps=4, save_every=2)
    trainer.fit()
    return trainer


def hope_checkpoint(path, vocab_size=257, weights_vocab=None):
    config = run_config({"model": {"vocab_size": vocab_size, "dim": 16, "num_layers": 1, "num_heads": 2}})
    wide = run_config({"model": {**config.to_dict()["model"], "vocab_size": weights_vocab or vocab_size}})
    torch.manual_seed(3)
    model = HopeLM(wide.model)
    payload = {
        "version": 1,
        "step": 5,
        "model": model.state_dict(),
        "tokenizer": ByteTokenizer().state(),
        "config": config.to_dict(),
        **{key: {} for key in ("optimizer", "loader", "random", "metrics")},
    }
    write_atomic(path, payload)
    return model, config


def test_model_tokenizer_and_config_come_back(tmp_path):
    model, config = hope_checkpoint(tmp_path / "a.pt")
    loaded, tokenizer, loaded_config = load_checkpoint(tmp_path / "a.pt")
    tokens = torch.tensor([tokenizer.encode("to be or not to be")])
    assert torch.equal(model.eval()(tokens)[0], loaded(tokens)[0])
    assert loaded_config == config and tokenizer.fingerprint == "byte"
    assert not loaded.training


def test_tokenizer_and_weights_of_different_vocabularies(tmp_path):
    hope_checkpoint(tmp_path / "a.pt", vocab_size=300)
    with pytest.raises(CheckpointError, match="tokenizer has 257 tokens but its weights are for 300"):
        load_checkpoint(tmp_path / "a.pt")
    hope_checkpoint(tmp_path / "b.pt", weights_vocab=300)
    with pytest.raises(CheckpointError, match=r"weights of checkpoint .*b\.pt do not fit its model"):
        load_checkpoint(tmp_path / "b.pt")


def test_a_missing_or_unexpected_weight_is_an_error(tmp_path):
    hope_checkpoint(tmp_path / "a.pt")
    payload = read_checkpoint(tmp_path / "a.pt")
    name, value = payload["model"].popitem()
    payload["model"]["stranger"] = value
    write_atomic(tmp_path / "a.pt", payload)
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(tmp_path / "a.pt")
    assert name in str(error.value) and "stranger" in str(error.value)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty"])
def test_damaged_file(saved, damage):
    path = saved.store.latest()
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        content[len(content) // 2] ^= 0x10
    path.write_bytes({"truncated": content[: len(content) // 2], "empty": b""}.get(damage, content))
    with pytest.raises(CheckpointError, match="corrupt"):
        read_checkpoint(path)


def test_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        read_checkpoint(tmp_path)


def test_a_directory_means_its_latest_checkpoint(saved):
    assert find_checkpoint(saved.config.run_dir).name == "step_00000004.pt"
    assert find_checkpoint(saved.config.run_dir / "checkpoints").name == "step_00000004.pt"


def test_another_format_version(saved):
    payload = read_checkpoint(saved.store.latest())
    write_atomic(saved.store.latest(), {**payload, "version": 99})
    with pytest.raises(CheckpointError, match="format version 99; this code reads 1"):
        read_checkpoint(saved.store.latest())


def test_keeps_the_newest_and_the_best(tmp_path):
    store = CheckpointStore(tmp_path, keep_last=2)
    for step, loss in enumerate([5.0, 3.0, 4.0, 4.5, 4.2], start=1):
        store.save({"step": step, "metrics": {"valid_loss": loss}})
    assert sorted(p.name for p in tmp_path.glob("*.pt")) == [f"step_0000000{i}.pt" for i in (2, 4, 5)]
    index = json.loads((tmp_path / "index.json").read_text())
    assert index == {"best": "step_00000002.pt", "best_loss": 3.0, "latest": "step_00000005.pt"}


def test_going_back_to_an_earlier_step_keeps_what_is_written_now(tmp_path):
    store = CheckpointStore(tmp_path, keep_last=1)
    store.save({"step": 9, "metrics": {}})
    store.save({"step": 4, "metrics": {}})
    assert store.latest() == tmp_path / "step_00000004.pt"
    assert [p.name for p in tmp_path.glob("*.pt")] == ["step_00000004.pt"]


def test_a_failed_write_leaves_the_former_file(tmp_path, monkeypatch):
    path = tmp_path / "a.pt"
    write_atomic(path, b"old")
    monkeypatch.setattr(torch, "save", lambda value, file: (file.write(b"ha"), 1 / 0))
    with pytest.raises(ZeroDivisionError):
        write_atomic(path, {"new": 1})
    assert path.read_bytes() == b"old"
    CheckpointStore(tmp_path, 1)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "section, key, value", [("optim", "lr", 0.5), ("model", "dim", 64), (None, "seed", 7)]
)
def test_resuming_another_run_names_the_difference(saved, make_trainer, section, key, value):
    payload = read_checkpoint(saved.store.latest())
    (payload["config"][section] if section else payload["config"])[key] = value
    write_atomic(saved.store.latest(), payload)
    with pytest.raises(CheckpointError, match=f"{key} is .*, was {value}"):
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
