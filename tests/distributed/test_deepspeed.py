"""DeepSpeed's stages on two processes. Minutes long, as DeepSpeed compiles an operator at its first start:

uv run pytest -m slow tests/distributed/test_deepspeed.py
"""

import os
import sys
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from test_one_objective import GOLDEN, PILOT
from test_resume import stop_at_six
from work import losses, tiny_overrides, train

from nested_learning.train.checkpoint import find_checkpoint, load_checkpoint
from nested_learning.train.checkpoint.manifest import write_manifest

pytestmark = pytest.mark.slow
pytest.importorskip("deepspeed")
STAGES = (1, 2, 3)


@pytest.fixture(autouse=True)
def ninja(monkeypatch):
    """DeepSpeed looks for ninja on the PATH."""
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")


@pytest.mark.parametrize("stage", STAGES)
def test_pilot_smoke_has_the_golden_losses(tmp_path, stage):
    own = [f"parallel=zero{stage}", f"train.output_dir={tmp_path}", "name=run"]
    run_ranks(2, tmp_path, train, [*PILOT, *own], "deepspeed")
    found = losses(tmp_path / "run")
    assert list(found) == list(range(1, 21))
    assert list(found.values()) == pytest.approx(GOLDEN["losses"], rel=1e-4)


@pytest.mark.parametrize("stage", STAGES)
def test_resumed_equals_uninterrupted_and_others_read_the_weights(tmp_path, stage):
    more = {"parallel": f"zero{stage}", "train.accumulation": 2}
    run_ranks(2, tmp_path, train, tiny_overrides(tmp_path, "whole", **more), "deepspeed")
    part = tiny_overrides(tmp_path, "part", **more)
    run_ranks(2, tmp_path, stop_at_six, part, "deepspeed")
    assert max(losses(tmp_path / "part")) == 6
    run_ranks(2, tmp_path, train, part, "deepspeed")
    whole = losses(tmp_path / "whole")
    assert losses(tmp_path / "part") == whole
    run_ranks(1, tmp_path, train, tiny_overrides(tmp_path, "single", **{"train.accumulation": 2}), "single")
    assert list(whole.values()) == pytest.approx(list(losses(tmp_path / "single").values()), rel=1e-4)
    weights = [dict(load_checkpoint(tmp_path / name)[0].named_parameters()) for name in ("part", "single")]
    for name, value in weights[1].items():
        assert weights[0][name].detach().numpy() == pytest.approx(value.detach().numpy(), abs=1e-4), name
    with pytest.raises(AssertionError, match="written by DeepSpeed"):
        run_ranks(1, tmp_path, train, part, "single")


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("stage", STAGES)
def test_a_payload_in_deepspeeds_own_files_is_not_run(tmp_path, stage):
    run = tiny_overrides(tmp_path, "run", parallel=f"zero{stage}")
    run_ranks(2, tmp_path, stop_at_six, run, "deepspeed")
    folder = find_checkpoint(tmp_path / "run")
    for file in (folder / "deepspeed").rglob("*_states.pt"):
        content = torch.load(file, weights_only=False)
        torch.save({**content, "more": Payload(tmp_path / "ran")}, file)
    write_manifest(folder)
    with pytest.raises(AssertionError, match=r"a file in .*deepspeed cannot be read"):
        run_ranks(2, tmp_path, train, run, "deepspeed")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("stage", [1, 3])
def test_it_begins_with_a_checkpoint_and_goes_on_at_another_rate_as_one_process_does(tmp_path, stage):
    train(tiny_overrides(tmp_path, "old", **{"train.steps": 4}), "single")
    first = {"train.init_from": tmp_path / "old", "optim.schedule": "constant", "train.steps": 4}
    changed = {**first, "train.steps": 8, "optim.lr": 1e-4, "optim.weight_decay": 0.5}
    changed["train.resume_with"] = "[optim.lr,optim.weight_decay]"
    zero = {"parallel.deepspeed": f"configs/deepspeed/zero{stage}.json"}
    for settings in (first, changed):
        train(tiny_overrides(tmp_path, "one", **settings), "single")
        run_ranks(2, tmp_path, train, tiny_overrides(tmp_path, "two", **settings, **zero), "deepspeed")
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert [two[i] for i in two] == pytest.approx([one[i] for i in one], rel=1e-4)
    assert list(two) == [1, 2, 3, 4, 5, 6, 7, 8]
