"""Options that do not fit machine or checkpoint: every evaluation script says so before it reads weights."""

from __future__ import annotations

import importlib
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

from nested_learning.commands.evaluation import EVALUATIONS
from nested_learning.data.tokenizer import train_sentencepiece
from nested_learning.eval import loading

ROOT = Path(__file__).parents[2]
DATA = Path(__file__).parent / "data" / "zeroshot"
EXAMPLES = [[f"text {i}", label] for label in ("x", "y") for i in range(2)]
SCRIPTS = {
    "class_incremental.py": ["--train", "examples.json", "--tasks", "1"],
    "compare.py": ["--length", "16"],
    "continual.py": ["--segments-yaml", str(ROOT / "configs/data/continual_segments_sample.yaml")],
    "held_out.py": [],
    "long_perplexity.py": [],
    "niah.py": [],
    "passkey.py": [],
    "zeroshot.py": ["--local-dir", str(DATA)],
}


@pytest.fixture
def refused(monkeypatch, capsys, tmp_path):
    """Run a script in this process: its only line, after exit status 2 and without a look at weights."""
    (tmp_path / "examples.json").write_text(json.dumps({"train": EXAMPLES, "test": EXAMPLES}))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loading, "load_checkpoint", lambda *_: pytest.fail("weights are read"))

    def run(script, checkpoint, *options):
        named = [] if script == "compare.py" else ["--checkpoint"]
        arguments = [script, *named, checkpoint, *SCRIPTS[script], *options]
        monkeypatch.setattr(sys, "argv", [str(argument) for argument in arguments])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(ROOT / "scripts" / "eval" / script), run_name="__main__")
        out, err = capsys.readouterr()
        assert (stop.value.code, out, err.count("\n")) == (2, "", 1), err
        assert [path.name for path in tmp_path.iterdir() if path.name.startswith("outputs")] == []
        return err.removesuffix("\n")

    return run


def test_all_scripts_with_a_device_are_tried_here():
    parsers = {
        module.rpartition(".")[2] + ".py": importlib.import_module(module).parser()
        for module in EVALUATIONS.values()
    }
    having = [script for script, parser in parsers.items() if "--device" in parser.names()]
    assert sorted(having) == sorted(SCRIPTS)
    assert sorted(parsers) == sorted(path.name for path in (ROOT / "scripts" / "eval").glob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_device_that_is_not_there(refused, exported, monkeypatch, script):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    expected = f"{script}: --device = 'cuda:0' is not on this machine; it has cpu"
    assert refused(script, exported, "--device", "cuda:0") == expected


def test_a_device_that_is_none(refused, exported):
    expected = "niah.py: --device must be auto, cpu, cuda, cuda:NUMBER or mps, got 'nonsense'"
    assert refused("niah.py", exported, "--device", "nonsense") == expected


@pytest.mark.parametrize("script", sorted(SCRIPTS.keys() - {"compare.py"}))
def test_the_configuration_of_another_model(refused, run_folder, exported, tmp_path, script):
    text = (run_folder / "config.yaml").read_text()
    other = tmp_path / "other.yaml"
    other.write_text(text.replace("dim: 16", "dim: 32").replace("num_layers: 2", "num_layers: 3"))
    for checkpoint in (run_folder, exported):
        message = refused(script, checkpoint, "--config", other)
        assert message.startswith(f"{script}: --config is for another model than checkpoint ")
        assert message.endswith(": model.dim = 32 (checkpoint: 16), model.num_layers = 3 (checkpoint: 2)")


def test_many_differences_are_counted(refused, exported):
    message = refused("niah.py", exported, "--config", "pilot")
    assert message.count("(checkpoint: ") == 4
    assert message.split(" and ")[-1].removesuffix(" more").isdigit()


def test_a_model_that_differs_in_what_is_no_weight_is_taken(run_folder, exported, tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text((run_folder / "config.yaml").read_text().replace("chunk_size: 8", "chunk_size: 16"))
    for checkpoint in (run_folder, exported):
        loaded = loading.load(checkpoint, config=mine)
        assert loaded.config.model.levels[0].chunk_size == 16


def test_the_tokenizer_of_another_vocabulary(refused, run_folder, exported, tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(train_sentencepiece(["some words to learn from, " * 50], 280).state()["model"])
    for checkpoint in (run_folder, exported):
        message = refused("niah.py", checkpoint, "--tokenizer-path", path)
        assert message.startswith("niah.py: --tokenizer-path has 280 tokens; checkpoint ")
        assert message.endswith(" is for 257")


def test_a_file_that_is_no_checkpoint(refused, tmp_path):
    wrong = tmp_path / "wrong.safetensors"
    wrong.write_bytes(b"nothing")
    message = refused("niah.py", wrong, "--config", "pilot")
    assert message.startswith(f"niah.py: checkpoint {wrong} is truncated or corrupt: ")
