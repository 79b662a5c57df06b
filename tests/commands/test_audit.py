"""The audit: the plan holds for everything that is shipped, and a level off its plan is a failure."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nested_learning.commands import audit as command
from nested_learning.commands import nl
from nested_learning.config import load_config
from nested_learning.layers import cms
from nested_learning.layers.config import MemoryConfig
from nested_learning.levels import LevelSpec
from nested_learning.models.bill import fast_weight_bill
from nested_learning.models.config import HopeConfig
from nested_learning.models.lm import HopeLM
from nested_learning.train import audit
from nested_learning.train.config import RunConfig, TrainConfig

ONE_ROW = ["train.batch_size=1", "train.accumulation=1"]


@pytest.mark.thorough
@pytest.mark.parametrize("title, name, overrides", command.shipped())
def test_every_shipped_configuration_does_what_it_plans(
    title: str, name: str, overrides: list[str], monkeypatch
) -> None:
    monkeypatch.setattr(audit, "LARGE", 0)  # width and depth reduced; `nl audit --all` takes them as they are
    result = audit.audit(load_config(name, [*overrides, *ONE_ROW]), title)
    assert result.ok, command.describe(result)
    fast = [level for level in result.config.model.levels if result.model.level_kind(level) == "fast"]
    assert len(result.checks) >= len(fast)


def small(**model: object) -> RunConfig:
    levels = (
        LevelSpec(name="quick", chunk_size=4),
        LevelSpec(name="fast", chunk_size=8, layers=(1,), momentum=True),
        LevelSpec(),
        LevelSpec(name="slow", chunk_size=60),
    )
    config = HopeConfig(
        vocab_size=11, dim=8, num_layers=2, num_heads=2, levels=levels, seq_len=20, chunk_size=4, **model
    )
    return RunConfig(name="small", model=config, train=TrainConfig(seq_len=20, batch_size=2))


def test_counts_of_every_clock() -> None:
    result = audit.audit(small(cms_variant="nested"))
    assert result.steps == 3 and result.rows == 2
    counts = {(c.where, c.level): (c.period, c.found) for c in result.checks}
    assert counts == {
        ("block 0", "quick"): (4, (5, 0)),
        ("block 1", "quick"): (4, (3, 2)),
        ("block 1", "fast"): (8, (2, 0)),
        ("optimizer", "slow"): (60, (1, 0)),
    }


def test_a_level_that_fires_too_rarely_fails(monkeypatch, capsys, tmp_path: Path) -> None:
    start = cms.FastLevel.__init__

    def late(self, dim, spec, *rest) -> None:
        start(self, dim, spec, *rest)
        self.chunk_size = 2 * spec.chunk_size

    monkeypatch.setattr(cms.FastLevel, "__init__", late)
    line = [
        "audit",
        "--config-name",
        "pilot_smoke",
        "--output",
        str(tmp_path),
        *ONE_ROW,
        "model.num_layers=1",
    ]
    assert nl.main(line) == 1
    text = capsys.readouterr().out
    assert "FAIL block 0, fast: found 4 updates, 0 resets; planned 8, 0" in text
    assert "failed: pilot_smoke" in text


def test_a_slow_level_that_the_optimizer_steps_every_time_fails(monkeypatch) -> None:
    monkeypatch.setattr(audit, "slow_levels", lambda config, model: {})
    result = audit.audit(small())
    assert [check.level for check in result.checks if not check.ok] == ["slow"]


def test_the_command_prints_and_draws(capsys, tmp_path: Path) -> None:
    line = ["audit", "--config-name", "mid", "--output", str(tmp_path)]
    assert nl.main(line) == 0
    text = capsys.readouterr().out
    assert "medium: fast, all blocks; update after 128, 256, 384, …, 2048 (16)" in text
    assert "1 training step(s) of 1 x 2048 tokens, reduced to width 16 and 2 blocks" in text
    assert "1 of 1 as planned" in text
    assert (tmp_path / "mid.png").read_bytes().startswith(b"\x89PNG")
    assert nl.main(["audit", "--config-name", "nowhere"]) == 2
    assert nl.main(["audit", "--config-name", "mid", "model.dmi=3"]) == 2


@pytest.mark.parametrize("momentum", [False, True])
def test_the_bill_is_the_size_of_the_state(momentum: bool) -> None:
    config = small(memory=MemoryConfig(momentum=momentum)).model
    bills = fast_weight_bill(config)
    state = HopeLM(config).init_state(3)
    assert 3 * sum(bill.total for bill in bills) == state.numel()
    quick = 2 * 8 * 8 * (2 if momentum else 1) + 8  # W₁ and W₂, their momenta, the key that waits
    assert bills[0].levels == {"quick": quick}
    assert bills[1].levels == {"quick": quick, "fast": 4 * 8 * 8 + 8}


def test_large_models_keep_the_blocks_that_their_levels_name() -> None:
    levels = (LevelSpec(name="fast", chunk_size=4, layers=(3,)), LevelSpec())
    config = HopeConfig(dim=512, num_layers=8, num_heads=8, levels=levels)
    smaller = audit.reduced(config)
    assert (smaller.dim, smaller.num_layers, smaller.levels) == (16, 4, levels)
    assert audit.reduced(HopeConfig()) == HopeConfig()
    with torch.device("meta"):
        HopeLM(smaller)
