"""One run directory: who may write to it, when its content is replaced, and what it survives."""

import errno
from pathlib import Path

import pytest
from test_launch import overrides

from nested_learning.config import load_config
from nested_learning.lock import InUseError, locked
from nested_learning.log_lines import read_log
from nested_learning.models.lm import HopeLM
from nested_learning.train.checkpoint import verify
from nested_learning.train.launch import launch
from nested_learning.train.memory import GIB, check_memory, weight_bytes
from nested_learning.train.metrics import JsonLinesWriter, read_metrics
from nested_learning.train.strategy import OneProcess


def content(folder):
    """Every file and its bytes."""
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def finished(tmp_path):
    """The directory of a run that has ended."""
    return launch(load_config("pilot_smoke", overrides(tmp_path))).run_dir


def test_a_second_process_is_kept_out_and_changes_nothing(finished, tmp_path):
    before = content(finished)
    config = load_config("pilot_smoke", overrides(tmp_path, **{"train.resume": "null"}))
    with locked(finished / ".lock", "it"):
        held = content(finished)
        with pytest.raises(InUseError, match=r"run directory .*pilot_smoke is in use by process \d+ on "):
            launch(config)
        assert content(finished) == held
    assert content(finished) == before


def test_the_old_run_stays_until_the_new_one_is_built(finished, tmp_path):
    before = content(finished)
    config = load_config("pilot_smoke", overrides(tmp_path, **{"train.resume": "null"}))
    config.optim.betas = (0.9, 1.0)
    with pytest.raises(ValueError, match="beta"):
        launch(config)
    assert content(finished) == before
    config.optim.betas, config.train.steps = (0.9, 0.95), 2
    assert launch(config).step == 2
    assert [path.name for path in (finished / "checkpoints").glob("step_*")] == ["step_00000002"]


def test_damaged_metrics_are_left_out_and_said(finished, tmp_path, capsys):
    path = finished / "metrics.jsonl"
    whole = read_metrics(path)
    lines = path.read_bytes().split(b"\n")
    lines[2] = b"\0" * 40
    lines[4] = b'{"step": "four"}'
    lines[6] = b"\xff" + lines[6]
    path.write_bytes(b"\n".join(lines) + b'{"step": 13, "lo')
    kept = [row for number, row in enumerate(whole) if number not in (2, 4, 6)]
    capsys.readouterr()
    assert read_metrics(path) == kept
    assert capsys.readouterr().err == f"{path}: 3 damaged lines are left out (line 3)\n"
    config = load_config("pilot_smoke", overrides(tmp_path, **{"train.steps": 13}))
    assert launch(config).step == 13
    assert read_metrics(path)[: len(kept)] == kept
    assert read_log(path)[1]  # nothing damaged is left in it


def test_a_log_says_whether_it_is_whole(tmp_path):
    path = tmp_path / "log.jsonl"
    assert read_log(path) == ([], True)
    for text, rows, whole in (
        (b'{"a": "\xe2\x80\xa8"}\n{"a": 2}\n', [{"a": "\u2028"}, {"a": 2}], True),
        (b'{"a": 1}\n{"a": 2}', [{"a": 1}], False),
        (b'{"a": 1}\n[2]\n', [{"a": 1}], False),
        (b'{"a": 1}\n\n{"a": 3}\n', [{"a": 1}, {"a": 3}], False),
    ):
        path.write_bytes(text)
        assert read_log(path) == (rows, whole)


def test_a_full_disk_names_the_metrics_file(tmp_path):
    writer = JsonLinesWriter(tmp_path / "m.jsonl", 0)
    writer.file.close()
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    writer.file = open("/dev/full", "ab", buffering=0)  # noqa: SIM115
    with pytest.raises(OSError, match="No space left on device: '/dev/full'") as caught:
        writer.write({"step": 1})
    assert caught.value.errno == errno.ENOSPC
    writer.close()


def test_a_plot_that_fails_does_not_fail_the_run(tmp_path, monkeypatch, capsys):
    def fail(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("nested_learning.train.launch.plot_losses", fail)
    result = launch(load_config("pilot_smoke", overrides(tmp_path)))
    printed = capsys.readouterr()
    assert "no plot: OSError: [Errno 28] No space left" in printed.err and "results in" in printed.out
    assert verify(result.run_dir / "checkpoints" / "step_00000012") == []


def test_a_model_that_cannot_fit_is_refused_with_the_sizes(monkeypatch):
    config = load_config("pilot_smoke", ["model.dim=16", "model.num_heads=2", "model.chunk_size=8"])
    weights = sum(p.numel() * p.element_size() for p in HopeLM(config.model).parameters())
    assert weight_bytes(config) == weights
    monkeypatch.setattr("nested_learning.train.memory.host_bytes", lambda: 4 * weights)
    check_memory(config, OneProcess())  # weights, gradients and two moments
    monkeypatch.setattr("nested_learning.train.memory.host_bytes", lambda: 4 * weights - 1)
    with pytest.raises(ValueError, match=r"the model is too large: weights, gradients and optimizer state"):
        check_memory(config, OneProcess())
    config.optim.name, config.optim.momentum = "sgd", 0.0
    check_memory(config, OneProcess())  # no moments
    spread = OneProcess()
    config.optim.name, spread.shards_parameters, spread.world_size = "adamw", True, 2
    check_memory(config, spread)  # two halves


def test_a_huge_model_is_refused_before_it_is_built(tmp_path):
    config = load_config("pilot_smoke", overrides(tmp_path, **{"model.dim": 1_000_000}))
    size = 4 * weight_bytes(config) / GIB
    assert size > 1e5
    with pytest.raises(ValueError, match=rf"need {size:.1f} GiB of \d+\.\d"):
        launch(config)
    assert not config.run_dir.exists()
    config = load_config("pilot_smoke", overrides(tmp_path, **{"model.dim": 10**10}))
    with pytest.raises(ValueError, match=r"model\.dim = 10000000000 cannot be built"):
        launch(config)
