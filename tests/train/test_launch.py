import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from nested_learning.config import load_config
from nested_learning.data.corpus import load_corpus
from nested_learning.data.tokenizer import ByteTokenizer
from nested_learning.models.lm import HopeLM
from nested_learning.ops.kernels import chosen
from nested_learning.train.checkpoint import CheckpointError, load_checkpoint, read_checkpoint
from nested_learning.train.compiling import settle
from nested_learning.train.launch import check_vocabulary, checkpoint_blocks, launch
from nested_learning.train.metrics import read_metrics
from nested_learning.train.objective import next_token_loss

ROOT = Path(__file__).parents[2]
WORDS = "It is a truth universally acknowledged, that a text must be in want of a reader. "


def overrides(folder, **more):
    (folder / "text.txt").write_text(WORDS * 80)
    settings = {
        "data": "bytes",
        "data.files": f"[{folder / 'text.txt'}]",
        "data.cache_dir": folder / "cache",
        "model.dim": 16,
        "model.num_heads": 2,
        "model.num_layers": 1,
        "model.chunk_size": 8,
        "levels": "mlp",
        "train.seq_len": 16,
        "train.batch_size": 2,
        "train.steps": 12,
        "train.compile": "false",
        "train.log_every": 1,
        "train.eval_every": 6,
        "train.save_every": 4,
        "train.eval_batches": 2,
        "train.sample_tokens": 5,
        "train.device": "cpu",
        "train.output_dir": folder / "out",
        "logging.progress": False,
    }
    return [f"{key}={value}" for key, value in {**settings, **more}.items()]


def start(arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "train.py"), *arguments]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def wait_for(condition, process):
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def losses(run_dir):
    return {row["step"]: row["loss"] for row in read_metrics(run_dir / "metrics.jsonl") if "loss" in row}


def test_a_run_leaves_everything_behind(tmp_path, capsys):
    config = load_config("pilot_smoke", overrides(tmp_path))
    result = launch(config)
    assert result.step == 12 and not result.interrupted
    assert {p.name for p in config.run_dir.iterdir()} == {
        *("config.yaml", "starts.jsonl", "metrics.jsonl", "loss.png", "sample.txt", "checkpoints")
    }
    assert (config.run_dir / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (config.run_dir / "sample.txt").read_text().startswith("The ")
    printed = capsys.readouterr().out
    entropy = load_corpus(config.data).unigram_entropy
    found = re.search(r"validation loss (\S+) nats/token \(unigram entropy (\S+)\), (\S+) bits/byte", printed)
    assert [float(x) for x in found.groups()] == pytest.approx(
        [result.valid_loss, entropy, result.bits_per_byte], abs=1e-4
    )
    model, tokenizer, loaded = load_checkpoint(config.run_dir)
    assert loaded == settle(config, torch.device("cpu")) and tokenizer.vocab_size == 257
    assert not model.training


def test_a_finished_run_is_reported_again_and_null_starts_anew(tmp_path, capsys):
    first = launch(load_config("pilot_smoke", overrides(tmp_path)))
    before = losses(first.run_dir)
    again = launch(load_config("pilot_smoke", overrides(tmp_path)))
    assert again == first and losses(first.run_dir) == before
    anew = launch(load_config("pilot_smoke", overrides(tmp_path, **{"train.resume": "null", "seed": 5})))
    assert losses(anew.run_dir)[1] != before[1]
    assert read_checkpoint(anew.run_dir)["config"]["seed"] == 5


@pytest.mark.thorough
def test_killed_and_resumed_equals_uninterrupted(tmp_path):
    arguments = overrides(tmp_path, **{"train.steps": 60})
    part = tmp_path / "out" / "part"
    process = start([*arguments, "name=part"])
    wait_for(lambda: (part / "checkpoints" / "index.json").exists(), process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    saved = read_checkpoint(part)["step"]
    assert saved < 60
    launch(load_config("pilot_smoke", [*arguments, "name=part"]))
    launch(load_config("pilot_smoke", [*arguments, "name=whole"]))
    assert list(losses(part)) == list(range(1, 61))
    assert losses(part) == losses(tmp_path / "out" / "whole")
    a, b = read_checkpoint(part)["model"], read_checkpoint(tmp_path / "out" / "whole")["model"]
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.thorough
def test_ctrl_c_saves_and_exits_0(tmp_path):
    process = start(overrides(tmp_path, **{"train.steps": 100_000, "train.save_every": 100_000}))
    run_dir = tmp_path / "out" / "pilot_smoke"
    wait_for(lambda: len(losses(run_dir)) >= 3, process)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    step = int(re.search(r"interrupted and saved at step (\d+)", output)[1])
    assert read_checkpoint(run_dir)["step"] == step == max(losses(run_dir))
    assert not list(ROOT.glob("*.log")) and not (ROOT / ".hydra").exists()


@pytest.mark.thorough
def test_unknown_key_on_the_command_line_is_one_error():
    process = start(["optim.lrr=1"])
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert output.startswith("train.py: unknown key 'optim.lrr'; did you mean optim.lr?")
    assert output.count("\n") == 1


def test_activation_checkpointing_changes_no_gradient_and_no_name():
    config = load_config("pilot_smoke", ["model.dim=16", "model.num_heads=2", "model.chunk_size=8"])
    torch.manual_seed(0)
    plain, wrapped = HopeLM(config.model), HopeLM(config.model)
    wrapped.load_state_dict(plain.state_dict())
    checkpoint_blocks(wrapped)
    assert list(wrapped.state_dict()) == list(plain.state_dict())
    tokens = torch.randint(1024, (2, 65))  # longer than every chunk, so that all weights matter
    kept = []
    for model in (plain, wrapped):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, s=sizes: s.append(t.numel()) or t, lambda t: t
        ):
            loss = next_token_loss(model(tokens[:, :-1])[0], tokens[:, 1:])
        loss.backward()
        kept.append(sum(sizes))
    assert kept[1] < kept[0] / 2
    for a, b in zip(plain.parameters(), wrapped.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_vocabulary_mismatch_and_no_files():
    config = load_config("pilot_smoke", ["model.vocab_size=999"])
    with pytest.raises(ValueError, match=r"model\.vocab_size is 999 but the tokenizer has 257"):
        check_vocabulary(config, ByteTokenizer())
    with pytest.raises(ValueError, match=r"data\.files is empty"):
        load_corpus(load_config("pilot").data)


def test_a_run_says_how_its_steps_run_and_keeps_the_precision_it_chose(tmp_path, capsys):
    config = load_config("pilot_smoke", overrides(tmp_path, name="run", **{"train.steps": 4}))
    assert config.train.precision == "auto"
    launch(config)
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("steps: "))
    assert line.startswith(
        "steps: fp32, not compiled (train.compile = false), no CUDA graphs (cpu has none), "
    )
    run = tmp_path / "out" / "run"
    assert "precision: fp32" in (run / "config.yaml").read_text()
    again = overrides(tmp_path, name="run", **{"train.steps": 6, "train.precision": "bf16"})
    with pytest.raises(CheckpointError, match=r"train\.precision is 'bf16', was 'fp32'; train\.resume_with="):
        launch(load_config("pilot_smoke", again))
    launch(load_config("pilot_smoke", [*again, "train.resume_with=[train.precision]"]))
    assert len(losses(run)) == 6 and chosen() == "auto"


def test_triton_and_graphs_are_refused_on_a_cpu(tmp_path):
    for field in ("kernels", "graphs"):
        value = {"kernels": "triton", "graphs": "true"}[field]
        config = load_config("pilot_smoke", overrides(tmp_path, name="run", **{f"train.{field}": value}))
        with pytest.raises(ValueError, match=rf"^train\.{field} must be auto or .*cpu"):
            launch(config)
