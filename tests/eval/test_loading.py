"""Checkpoints for evaluation: what they may be, and what is refused."""

import argparse
import hashlib
import json
import shutil

import pytest
import torch

from nested_learning.commands.evaluation.options import add_checkpoint_options, load_from
from nested_learning.data.tokenizer import train_sentencepiece
from nested_learning.eval.loading import load, locate
from nested_learning.train.checkpoint import CheckpointError


def test_run_folder_checkpoint_folder_and_file_are_the_same_model(run_folder, exported):
    tokens = torch.randint(257, (1, 20), generator=torch.Generator().manual_seed(0))
    latest = run_folder / "checkpoints" / "step_00000006"
    logits = [load(path).model(tokens)[0] for path in (run_folder, latest, exported)]
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])
    assert not torch.equal(logits[0], load(run_folder / "checkpoints" / "step_00000002").model(tokens)[0])


def test_the_model_is_in_evaluation_mode_without_gradients(run_folder):
    loaded = load(run_folder)
    assert not loaded.model.training
    assert not any(p.requires_grad for p in loaded.model.parameters())


def test_the_sha256_is_that_of_file_or_manifest(run_folder, exported):
    assert load(exported).sha256 == hashlib.sha256(exported.read_bytes()).hexdigest()
    loaded = load(run_folder)
    assert loaded.sha256 == hashlib.sha256((loaded.path / "manifest.json").read_bytes()).hexdigest()


def test_best_is_the_checkpoint_with_the_lowest_validation_loss(run_folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run_folder, copy)
    index = copy / "checkpoints" / "index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "best": "step_00000004"}))
    assert locate(f"{copy}:best").name == "step_00000004"
    assert locate(copy).name == "step_00000006"
    index.write_text(json.dumps({"latest": "step_00000006"}))
    with pytest.raises(CheckpointError, match="no checkpoint with a validation loss"):
        locate(f"{copy}:best")


def test_a_configuration_of_ones_own_replaces_that_of_the_checkpoint(run_folder, tmp_path):
    text = (run_folder / "config.yaml").read_text()
    assert "name: tiny" in text
    mine = tmp_path / "mine.yaml"
    mine.write_text(text.replace("name: tiny", "name: mine"))
    assert load(run_folder, config=mine).config.name == "mine"
    mine.write_text(text.replace("dim: 16", "dim: 32"))
    with pytest.raises(CheckpointError, match=r"model\.dim = 32 \(checkpoint: 16\)"):
        load(run_folder, config=mine)


def test_a_tokenizer_that_does_not_fit_is_refused(run_folder, tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(train_sentencepiece(["some words to learn from, " * 50], 280).state()["model"])
    with pytest.raises(CheckpointError, match="has 280 tokens; checkpoint .* is for 257"):
        load(run_folder, tokenizer_path=path)
    with pytest.raises(CheckpointError, match="is for 257 tokens"):
        load(run_folder, config=run_folder / "config.yaml", tokenizer_path=path)


def test_options_load_what_they_name(exported, tmp_path):
    parser = argparse.ArgumentParser()
    add_checkpoint_options(parser)
    loaded = load_from(parser.parse_args(["--checkpoint", str(exported)]))
    assert loaded.describe() == {"name": "tiny", "path": str(exported), "sha256": loaded.sha256}
    assert loaded.output("x").as_posix() == f"outputs/eval/tiny-{loaded.sha256[:8]}/x.json"
    assert loaded.output("x", tmp_path / "y.json") == tmp_path / "y.json"
