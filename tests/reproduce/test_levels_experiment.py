"""The experiment on levels: its rows are of one size, a grown model keeps its weights, its cells add up."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import pytest
import torch

from nested_learning.commands.reproduce import parser
from nested_learning.data.synthetic.needle import WORDS
from nested_learning.models.bill import count_parameters
from nested_learning.models.config import HopeConfig
from nested_learning.models.lm import HopeLM
from nested_learning.reproduce import levels
from nested_learning.train.level_report import LevelEffect

TINY = HopeConfig(vocab_size=len(WORDS), dim=8, num_layers=1, num_heads=2, mixer="linear", chunk_size=8)
RUN = levels.LevelsRun(
    model=replace(TINY, levels=levels.levels_of((4, 16))),
    length=64,
    needles=1,
    samples=4,
    steps=4,
    batch_size=2,
)


def options(line: str = "") -> Any:
    return parser().parse_args(["levels", *line.split()])


def test_rows_are_sets_of_levels_of_one_size() -> None:
    given = options("--seeds 3 4 --grow")
    plan = given.experiment.prepare(given)
    assert list(plan)[:4] == ["MLP alone", "periods 4", "periods 4, 16", "periods 4, 16, grown"]
    assert {"periods 4, 16, 64", "periods 4, 8", "periods 4, 32", "periods 4, 64"} <= set(plan)
    sizes = [count_parameters(row[0].model) for row in plan.values()]
    assert max(sizes) < 1.01 * min(sizes)
    assert all([run.seed for run in row] == [3, 4] for row in plan.values())
    with pytest.raises(ValueError, match="periods must be below length = 96, got 256"):
        options("--numbers 4").experiment.prepare(options("--numbers 4"))


def test_a_grown_model_has_the_weights_so_far() -> None:
    small = HopeLM(replace(TINY, levels=levels.levels_of((4,))))
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.add_(torch.randn_like(parameter))
    large = levels.grown(small, replace(TINY, levels=levels.levels_of((4, 16))))
    names = {"levels.0": "levels.0", "norms.0": "norms.0", "levels.1": "levels.2", "norms.1": "norms.2"}
    found = large.state_dict()
    for name, value in small.state_dict().items():
        for old, new in names.items():
            if f".memory.{old}." in name:
                name = name.replace(old, new)
                break
        assert torch.equal(found[name], value), name


def test_a_run_reports_its_levels_and_all_its_steps() -> None:
    ticks: list[int] = []
    result = replace(RUN, steps=5, grow=True).run(ticks.append)
    assert sum(ticks) == 5 and result["steps"] == 3  # of the second of two stages
    assert [one["level"] for one in result["effects"]] == ["every4", "every16", "mlp"]
    assert all(one["loss"] == pytest.approx(result["loss"]) for one in result["effects"])


def test_cells_are_means_over_seeds() -> None:
    given = options("--numbers 1 --lowest 8 --seeds 0 1")
    effects = {
        0: [LevelEffect("every4", "fast", 0.2, 1.0, 1.2), LevelEffect("mlp", "plain", 1.0, 1.0, 2.0)],
        1: [LevelEffect("every4", "fast", 0.4, 1.0, 1.0), LevelEffect("mlp", "plain", 3.0, 1.0, 2.0)],
    }
    plan = {"periods 4": given.experiment.prepare(given)["periods 4"]}
    outcome = {
        label: [
            (
                run,
                {
                    **{"right": 64 + 64 * run.seed, "loss": 1.0, "parameters": 1234, "curve": [(1, 1.0)]},
                    "effects": [asdict(effect) for effect in effects[run.seed]],
                },
            )
            for run in runs
        ]
        for label, runs in plan.items()
    }
    (row,) = levels.report(given, outcome).rows
    assert row[:2] == ["periods 4", "1,234"] and row[2].startswith("0.375 ± ")
    assert row[4:] == ["every4 3.0e-01, mlp 2.0e+00", "every4 +0.1000, mlp +1.0000", "every4 (1 of 2)"]
