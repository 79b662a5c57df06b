"""Signals, killed ranks, full disks: what is saved stays usable, and the message says what happened."""

import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ranks import Ranks, run_ranks
from work import losses, tiny_overrides, train

from nested_learning.train.checkpoint import find_checkpoint, read_checkpoint, verify

ROOT = Path(__file__).parents[2]
ENDLESS = {
    "train.compile": "false",
    "train.steps": 100_000,
    "train.save_every": 100_000,
    "train.eval_every": 100_000,
}


def wait_for(condition, alive, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert alive() and time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("number, rank", [(signal.SIGTERM, 1), (signal.SIGINT, None)])
def test_a_signal_to_one_rank_or_all_saves_and_ends_with_0(tmp_path, number, rank):
    ranks = Ranks(2, tmp_path, train, tiny_overrides(tmp_path, "run", **ENDLESS), "ddp")
    wait_for(lambda: len(losses(tmp_path / "run")) >= 3, ranks.processes[0].is_alive)
    ranks.kill(rank, number)
    if rank is None:
        ranks.kill(rank, number)  # torchrun sends a Ctrl-C again
    assert ranks.join() == [0, 0], ranks.output
    step = int(re.search(r"interrupted and saved at step (\d+)", ranks.output)[1])
    assert read_checkpoint(tmp_path / "run")["step"] == step == max(losses(tmp_path / "run"))


def torchrun(folder, *options, **more):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    port = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    settings = tiny_overrides(folder, "run", **more)
    return subprocess.Popen(
        [*command, *port, *options, str(ROOT / "train_dist.py"), *settings],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def worker(parent, rank):
    """Process id of a rank below torchrun."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    for child in children:
        if f"LOCAL_RANK={rank}\0" in Path(f"/proc/{child}/environ").read_text():
            return int(child)
    raise AssertionError(children)


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
def test_a_killed_rank_ends_the_others_and_is_named(tmp_path):
    process = torchrun(tmp_path, **ENDLESS)
    wait_for(lambda: len(losses(tmp_path / "run")) >= 2, lambda: process.poll() is None)
    os.kill(worker(process.pid, 1), signal.SIGKILL)
    killed = time.monotonic()
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert time.monotonic() - killed < 60
    assert re.search(r"rank\s+: 1 \(local_rank: 1\)\s+exitcode\s+: -9", output), output
    assert "rank 1 does not answer: it was killed or hangs" in output


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
def test_torchrun_starts_again_from_the_last_checkpoint(tmp_path):
    more = {"train.steps": 30, "train.save_every": 3, "train.eval_every": 30}
    run_ranks(2, tmp_path, train, tiny_overrides(tmp_path, "whole", **more), "ddp")
    process = torchrun(tmp_path, "--max-restarts", "1", **more, **{"train.resume": "null"})
    index = tmp_path / "run" / "checkpoints" / "index.json"
    wait_for(index.exists, lambda: process.poll() is None)
    os.kill(worker(process.pid, 1), signal.SIGKILL)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    assert "resumed from" in output
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def train_on_a_full_disk(overrides, strategy, full_rank):
    """From step 4 on, this rank can write no file longer than 20 kB."""
    from nested_learning.train.trainer import Trainer

    original = Trainer.update

    def update(self, tokens):
        if self.step == 4:
            self.checkpoints.wait()  # that of step 4 is whole
        if self.step == 4 and self.strategy.rank == full_rank:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
        return original(self, tokens)

    Trainer.update = update
    try:
        train(overrides, strategy)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


@pytest.mark.parametrize("strategy, count, background", [("single", 1, "true"), ("fsdp", 2, "false")])
def test_a_full_disk_leaves_the_former_checkpoint(tmp_path, strategy, count, background):
    overrides = tiny_overrides(tmp_path, "run", **{"parallel.async_save": background})
    errors = run_ranks(count, tmp_path, train_on_a_full_disk, overrides, strategy, count - 1)
    assert all(error.startswith("CheckpointError: cannot write") for error in errors), errors
    assert "File too large" in errors[-1]
    path = find_checkpoint(tmp_path / "run")
    assert path.name == "step_00000004" and verify(path) == []
    assert sorted(p.name for p in path.parent.iterdir()) == ["index.json", "step_00000004"]
    run_ranks(count, tmp_path, train, overrides, strategy)  # with room again, it goes on
    assert list(losses(tmp_path / "run")) == list(range(1, 13))


def test_background_writing_saves_the_moment_it_was_asked(tmp_path):
    for name, background in (("at_once", "false"), ("behind", "true")):
        more = {"parallel.async_save": background, "train.save_every": 5, "train.keep_last": 9}
        run_ranks(2, tmp_path, train, tiny_overrides(tmp_path, name, **more), "fsdp")
    for step in (5, 10, 12):
        folders = [tmp_path / name / "checkpoints" / f"step_{step:08d}" for name in ("at_once", "behind")]
        a, b = (read_checkpoint(folder) for folder in folders)
        assert all((a["model"][key] == b["model"][key]).all() for key in a["model"])
        assert a["loader"] == b["loader"]


@pytest.mark.parametrize(
    "strategy, override, message",
    [
        ("ddp", {"train.batch_size": 3}, "train.batch_size must be a multiple of processes"),
        ("deepspeed", {"parallel.deepspeed": "no.json"}, "parallel.deepspeed: there is no file no.json"),
        ("deepspeed", {"parallel.async_save": "true"}, "parallel.async_save must be false"),
        ("deepspeed", {"levels": "fast", "model.levels.1.chunk_size": 48}, r"slow levels \(.*\) cannot wait"),
        ("pipeline", {}, "strategy must be one of single, ddp, fsdp, deepspeed, got 'pipeline'"),
    ],
)
def test_what_is_not_supported_is_said(tmp_path, monkeypatch, strategy, override, message):
    from work import config_of

    from nested_learning.train.strategy import build_strategy

    monkeypatch.setenv("WORLD_SIZE", "2")
    error = FileNotFoundError if "no file" in message else ValueError
    with pytest.raises(error, match=message):
        build_strategy(strategy, config_of(tiny_overrides(tmp_path, "run", **override)))


@pytest.mark.slow
def test_a_sweep_under_torchrun_has_all_jobs_and_one_table(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    settings = tiny_overrides(tmp_path, "sweep", **{"train.steps": 2})
    done = subprocess.run(
        [*command, str(ROOT / "train_dist.py"), "-m", "seed=0,1", *settings],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("| done   |") == 2
    assert {max(losses(tmp_path / "sweep" / f"seed={seed}")) for seed in (0, 1)} == {2}
