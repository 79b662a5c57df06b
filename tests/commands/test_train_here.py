"""`nl train`: the configurations of the package, from any folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra

from nested_learning import home
from nested_learning.commands import doctor, nl
from nested_learning.commands.train_here import take_launcher
from nested_learning.home import config_file, config_folder
from nested_learning.train import summary
from nested_learning.train.checkpoint import load_checkpoint

TINY = [
    *("data=bytes", "name=tiny", "train.steps=3", "train.eval_every=3", "train.batch_size=2"),
    *("train.seq_len=64", "train.eval_batches=1", "model.dim=16", "model.num_heads=2", "model.num_layers=1"),
    *("train.sample_tokens=4", "train.device=cpu"),
]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    GlobalHydra.instance().clear()
    monkeypatch.chdir(tmp_path)


def run(*words: str) -> int:
    """The exit status of `nl train`, which may exit by itself."""
    try:
        return nl.main(["train", *words])
    except SystemExit as end:
        return int(end.code or 0)


def test_it_trains_and_says_what_to_try_next(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*TINY) == 0
    printed = capsys.readouterr().out
    _, _, config = load_checkpoint("outputs/tiny")
    assert config.train.steps == 3
    assert f"{3 * 2 * 64:,} tokens in 0:0" in printed
    assert "outputs/tiny: checkpoints, metrics.jsonl, loss.png, sample.txt" in printed
    assert "nl generate outputs/tiny --prompt 'Call me'" in printed


def test_commands_to_try_next_exist() -> None:
    for text, _ in summary.NEXT:
        first, second, *_ = text.split()
        entry = nl.COMMANDS[first]
        assert isinstance(entry, str) or second in entry.commands


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config-name", "pilott"], "no configuration 'pilott'; did you mean pilot?"),
        (["optim=m4"], "no configuration 'optim/m4'; there are adamw, deep_momentum"),
        (["optim=mon"], "did you mean muon?"),
        (["optim.lrr=1"], "unknown key 'optim.lrr'; did you mean optim.lr?"),
        (["--launcher", "fspd"], "--launcher must be one of single, ddp, fsdp, deepspeed, got 'fspd'"),
        (["--launcher"], "--launcher needs one of single"),
        (["--confg-name", "x"], "unknown argument '--confg-name'; did you mean --config-name?"),
    ],
)
def test_mistakes_name_what_is_near(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*words) == 2
    assert message in capsys.readouterr().err


def test_help_is_ours(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    assert "--launcher fsdp" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "name", "left"),
    [
        ([], "single", []),
        (["a=1", "--launcher", "ddp", "b=2"], "ddp", ["a=1", "b=2"]),
        (["--launcher=fsdp", "-m"], "fsdp", ["-m"]),
    ],
)
def test_the_launcher_is_taken_from_the_line(words: list[str], name: str, left: list[str]) -> None:
    assert take_launcher(words) == name and words == left


def test_configurations_are_found_in_a_wheel_and_in_a_clone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = config_folder()
    assert (own / "pilot_smoke.yaml").is_file()
    assert config_file("configs/deepspeed/zero1.json", "a") == own / "deepspeed" / "zero1.json"
    with pytest.raises(FileNotFoundError, match=r"a: there is no file configs/deepspeed/zero9\.json"):
        config_file("configs/deepspeed/zero9.json", "a")
    package = tmp_path / "site" / "lib" / "nested_learning"
    (package / "configs").mkdir(parents=True)
    monkeypatch.setattr(home, "PACKAGE", package)
    with pytest.raises(FileNotFoundError, match="is not whole"):
        config_folder()
    (package / "configs" / "base.yaml").touch()
    assert config_folder() == package / "configs" and not home.in_a_clone()


def test_the_doctor_speaks_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(doctor, "REQUIRED", ("numpy", "no_such_package"))
    monkeypatch.setattr(doctor, "matmul_rate", lambda: 123.04)
    assert nl.main(["doctor", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["matmul_gflops"] == 123.0 and found["packages"]["numpy"][0].isdigit()
    assert found["problems"] == ["no_such_package: No module named 'no_such_package'"]
    assert found["configurations"] == str(config_folder())
