"""Fast levels against plain MLPs: what is compared, and how it is counted."""

from __future__ import annotations

import re

import pytest

from nested_learning.commands.nl import main
from nested_learning.commands.reproduce import parser
from nested_learning.models.bill import count_parameters
from nested_learning.models.lm import HopeLM
from nested_learning.reproduce import cms


def plan_of(line: str):
    options = parser().parse_args(["cms", *line.split(" | ")])
    return options, options.experiment.prepare(options)


def test_the_plain_mlp_has_at_least_as_many_parameters_and_hardly_more() -> None:
    _, plan = plan_of("--settings | default | chunks=8,32 expansion=0.5 | key=projected")
    counts = {label: count_parameters(runs[0].model) for label, runs in plan.items()}
    others = [count for label, count in counts.items() if label != cms.PLAIN]
    assert max(others) <= counts[cms.PLAIN] < max(others) + 3 * 3 * 8 * 128
    model = plan["default"][0].model
    assert counts["default"] == sum(p.numel() for p in HopeLM(model).parameters())
    assert [level.chunk_size for level in plan[cms.PLAIN][0].model.levels] == [None]


def test_settings_change_the_fast_levels_only() -> None:
    _, plan = plan_of("--settings | chunks=8,32 eta=0.1 target=same | variant=nested | never")
    first = plan["chunks=8,32 eta=0.1 target=same"][0].model
    assert [(level.chunk_size, level.eta, level.target) for level in first.levels] == [
        (8, 0.1, "same"),
        (32, 0.1, "same"),
        (None, None, "next"),
    ]
    assert plan["variant=nested"][0].model.cms_variant == "nested"
    never = plan["never"][0]
    assert all(level.chunk_size > never.seq_len for level in never.model.levels[:-1])
    assert {run.seed for run in plan["never"]} == {0, 1, 2, 3}


def test_wins_are_counted_seed_by_seed() -> None:
    losses = {cms.PLAIN: [4.0, 4.0, 4.0, None], "default": [3.9, 4.1, 3.0, 3.0]}
    options, plan = plan_of("--settings | default")
    base = {"max_norm": 1.0, "parameters": 7, "unigram_entropy": 5.0, "seconds": 2.0}
    outcome = {
        label: [
            (run, {**base, "final": v, "curve": [(9, v)]}) for run, v in zip(runs, losses[label], strict=True)
        ]
        for label, runs in plan.items()
    }
    report = cms.report(options, outcome)
    assert [row[-3] for row in report.rows] == ["-", "3 of 4"]
    outcome[cms.PLAIN][3][1]["final"] = 4.0
    rows = cms.report(options, outcome).rows
    assert rows[1][2:8] == ["3.9000", "4.1000", "3.0000", "3.0000", "3.5000", "-12.50%"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--length", "300"], "length must divide the 2048 tokens of a step, got 300"),
        (["--settings", "speed=3"], "a level has no field 'speed'"),
        (["--settings", "eta"], "pairs of key=value, got 'eta'"),
        (["--settings", "eta=2"], "levels.fast0.eta must be in (0, 1] or null, got 2"),
    ],
)
def test_bad_input_is_named(arguments: list[str], message: str, capsys) -> None:
    assert main(["reproduce", "cms", *arguments]) == 2
    assert re.search(re.escape(message), capsys.readouterr().err)
