import errno
import runpy
import signal
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from nested_learning.commands.train import name_by_difference
from nested_learning.train.trainer import Trainer

ROOT = Path(__file__).parents[2]


def named(job, command_line, name="pilot"):
    config = OmegaConf.create({"name": name, "seed": 3})
    name_by_difference(config, job.split(), command_line.split())
    return config.name


def test_a_job_is_named_by_what_differs():
    assert named("seed=0 train.steps=5", "-m seed=0,1 train.steps=5") == "pilot/seed=0"
    assert (
        named("seed=0 optim.lr=0.1", "--multirun seed=range(2) optim.lr=0.1,0.2")
        == "pilot/seed=0,optim.lr=0.1"
    )
    assert (
        named("seed=0 data.files=[a]", "-m --config-name=x seed=0 data.files=[a],[b]")
        == "pilot/data.files=[a]"
    )
    assert named("seed=0", "-m seed=0") == "pilot"


def test_a_path_in_a_value_makes_no_folder():
    assert named("data.shards=a/../../b", "-m data.shards=a/../../b,c") == "pilot/data.shards=a%2F..%2F..%2Fb"


def test_a_name_of_the_sweep_is_respected():
    assert named("name=a", "-m name=a,b", name="a") == "a"
    assert named("name=a seed=1", "-m name=a seed=0,1", name="a") == "a/seed=1"
    assert named("name=r_${seed} seed=3", "-m name=r_${seed} seed=3,4", name="r_${seed}") == "r_3"


SETTINGS = {
    "data": "bytes",
    "model.dim": 16,
    "model.num_heads": 2,
    "model.num_layers": 1,
    "model.chunk_size": 8,
    "levels": "mlp",
    "train.seq_len": 16,
    "train.batch_size": 2,
    "train.steps": 2,
    "train.eval_batches": 1,
    "train.sample_tokens": 0,
    "train.device": "cpu",
    "logging.progress": False,
}


@pytest.fixture
def train(tmp_path, monkeypatch):
    """`train(*options)`: train.py in this process, on a text of one line; its exit code, None for 0."""
    (tmp_path / "text.txt").write_text("It is a truth universally acknowledged. " * 80)
    places = {
        "data.files": f"[{tmp_path}/text.txt]",
        "data.cache_dir": tmp_path / "cache",
        "train.output_dir": tmp_path,
    }
    settings = [f"{key}={value}" for key, value in {**SETTINGS, **places}.items()]

    def run(*options):
        monkeypatch.setattr("sys.argv", ["train.py", *options, *settings])
        GlobalHydra.instance().clear()
        try:
            runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
        except SystemExit as end:
            return end.code
        return None

    return run


def test_a_sweep_goes_on_after_a_job_that_fails_and_says_so(train, tmp_path, capsys):
    assert train("-m", "train.accumulation=3,1") == 2
    line = "train.py: job pilot_smoke/train.accumulation=3: train.accumulation must divide"
    assert line in capsys.readouterr().err
    assert not (tmp_path / "pilot_smoke" / "train.accumulation=3").exists()
    assert (tmp_path / "pilot_smoke" / "train.accumulation=1" / "checkpoints" / "step_00000002").is_dir()
    assert not list(Path().glob("multirun*"))


def test_an_interrupted_job_ends_the_sweep(train, tmp_path, monkeypatch, capsys):
    original = Trainer.update

    def update(self, tokens):
        signal.raise_signal(signal.SIGINT)
        return original(self, tokens)

    monkeypatch.setattr(Trainer, "update", update)
    assert train("-m", "seed=0,1") == 130
    assert (tmp_path / "pilot_smoke" / "seed=0" / "checkpoints" / "step_00000001").is_dir()
    assert not (tmp_path / "pilot_smoke" / "seed=1").exists()
    assert "jobs that are left" in capsys.readouterr().err


def test_what_cannot_be_used_is_one_line(train, tmp_path, capsys):
    (tmp_path / "pilot_smoke").write_text("a file in the place of the run directory")
    assert train() == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(
        f"train.py: run directory {tmp_path}/pilot_smoke (train.output_dir/name) cannot be"
    )
    assert "File exists" in line


def test_an_output_folder_below_a_file_or_read_only_is_one_line(train, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    assert train("name=file/run") == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.endswith(f"cannot be written to: Not a directory: {tmp_path}/file/run")

    def refuse(path, *args, **kwargs):
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr("nested_learning.lock._acquire", refuse)
    assert train() == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "cannot be written to: Read-only file system" in line


def test_ctrl_c_before_the_first_step_is_one_line(train, monkeypatch, capsys):
    monkeypatch.setattr("nested_learning.train.launch.load_corpus", lambda *_: signal.raise_signal(2))
    assert train() == 130
    assert capsys.readouterr().err == "\nstopped; the same command goes on from the last saved place\n"
