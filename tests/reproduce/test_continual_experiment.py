"""The continual experiment: its texts, its batches, its methods, and that its cells are the runs' numbers."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nested_learning.commands.reproduce import parser
from nested_learning.data.loader import TokenLoader
from nested_learning.models.config import HopeConfig
from nested_learning.reproduce import continual
from nested_learning.reproduce.continual import ContinualRun
from nested_learning.reproduce.domains import domain_text, domain_tokens, training_batches

TINY = ContinualRun(
    model=HopeConfig(vocab_size=257, dim=16, num_layers=1, num_heads=2, mixer="attention"),
    domains=("scripture", "cipher"),
    seq_len=16,
    batch_size=4,
    steps_per_domain=6,
    eval_batches=1,
    fisher_rows=4,
)


def options(line: str = "") -> Any:
    return parser().parse_args(["continual", *line.split()])


def test_the_cipher_exchanges_letters_and_keeps_everything_else() -> None:
    plain, cipher = domain_text("speeches"), domain_text("cipher")
    pairs = set(zip(plain, cipher, strict=True))
    assert len({a for a, _ in pairs}) == len({b for _, b in pairs}) == len(pairs)  # one to one
    for a, b in pairs:
        assert a.isascii() == b.isascii() and a.isupper() == b.isupper() and (a.isalpha() or a == b)
    assert sum(a != b for a, b in pairs) > 40


def test_domains_are_different_and_the_held_out_part_is_not_trained_on() -> None:
    train, valid = domain_tokens("novel")
    assert bytes(train) + bytes(valid) == domain_text("novel").encode()
    assert 0.04 < len(valid) / (len(train) + len(valid)) < 0.06
    with pytest.raises(ValueError, match=r"domains must be of novel, .*, cipher, got 'none'"):
        domain_text("none")


def loader(value: int, batch_size: int) -> TokenLoader:
    return TokenLoader(np.full(400, value, dtype=np.uint8), 9, batch_size, 0)


def test_a_part_of_every_batch_is_replayed() -> None:
    batches = training_batches(loader(1, 8), [loader(2, 1), loader(3, 1)], 0.25, random.Random(0))
    values = []
    for inputs, targets in islice(batches, 40):
        assert torch.equal(inputs[:, 0], targets[:, -1]) and inputs.shape == (8, 9)
        values += [inputs[:, 0].tolist()]
    assert all(row.count(1) == 6 for row in values)
    second = sum(row.count(2) for row in values)
    assert 20 < second < 60  # of 80
    alone = training_batches(loader(1, 8), [], 0.25, random.Random(0))
    assert set(next(alone)[0].flatten().tolist()) == {1}


def test_rows_of_the_matrix_are_after_each_domain() -> None:
    """The first row is that of a run on the first domain alone, and joint training has one row."""
    ticks: list[int] = []
    losses = TINY.run(ticks.append)["losses"]
    assert sum(ticks) == TINY.steps == 12
    assert [len(row) for row in losses] == [2, 2]
    again = replace(TINY, domains=("scripture", "novel")).run(ticks.append)["losses"]
    assert again[0][0] == losses[0][0] and again[1][0] != losses[1][0]
    assert losses[1][1] < losses[0][1] - 0.05  # the cipher was learned
    joint = replace(TINY, joint=True).run(ticks.append)["losses"]
    assert joint[0] == joint[1] != losses[1]


def test_consolidation_and_replay_change_only_what_follows_the_first_domain() -> None:
    naive = TINY.run(lambda _: None)["losses"]
    held = replace(TINY, ewc=1e6).run(lambda _: None)["losses"]
    replayed = replace(TINY, replayed=0.5).run(lambda _: None)["losses"]
    assert held[0] == replayed[0] == naive[0]
    assert held[1][0] < naive[1][0] or held[1][1] > naive[1][1]
    assert held[1] != naive[1] and replayed[1] != naive[1]


def test_rows_are_the_methods_at_equal_size() -> None:
    given = options("--seeds 3 --ewc 7 --replayed 0.5")
    plan = given.experiment.prepare(given)
    runs = {name: row[0] for name, row in plan.items()}
    assert list(runs) == [
        *("HOPE, fine-tuned", "HOPE, replay", "Transformer, fine-tuned"),
        *("Transformer, EWC", "Transformer, replay", "Transformer, all at once"),
    ]
    assert runs["Transformer, EWC"].ewc == 7 and runs["HOPE, replay"].replayed == 0.5
    assert {run.steps for run in runs.values()} == {4 * 64}
    hope, plain = (
        continual.count_parameters(runs[f"{name}, replay"].model) for name in ("HOPE", "Transformer")
    )
    assert hope <= plain < 1.02 * hope
    kinds = [runs["HOPE, replay"].model.level_kind(level) for level in runs["HOPE, replay"].model.levels]
    assert kinds == ["fast", "plain", "slow"]
    with pytest.raises(ValueError, match="domains must be at least two"):
        options("--domains novel").experiment.prepare(options("--domains novel"))


def test_cells_are_the_measures_of_the_matrices() -> None:
    given = options("--domains scripture novel --seeds 0 1")
    shift = {0: 0.0, 1: 0.2}
    outcome = {
        name: [
            (run, {"losses": [[1.0, 3.0], [1.5 + shift[run.seed], 2.0]], "parameters": 1000, "effects": []})
            for run in runs
        ]
        for name, runs in given.experiment.prepare(given).items()
    }
    report = continual.report(given, outcome)
    half = 12.706 * 0.05  # Student's t with one degree of freedom, of 1.75 and 1.85
    name, parameters, end, when, lost, back = report.rows[0]
    assert (name, parameters, when) == ("HOPE, fine-tuned", "1,000", "1.500 ± 0.000")
    assert end.startswith("1.800 ± ") and lost.startswith("0.600 ± ") and back.startswith("-0.600 ± ")
    assert float(end.split("± ")[1]) == pytest.approx(half, abs=1e-3)
    assert report.rows[-1][3:] == ["-", "-", "-"]
    assert report.numbers[0]["losses"] == [[1.0, 3.0], [pytest.approx(1.6), 2.0]]


def test_the_command_writes_table_and_picture(tmp_path: Path) -> None:
    given = options(f"--quick --jobs 1 --output {tmp_path}")
    plan = {
        name: [replace(TINY, steps_per_domain=1, joint=run.joint, ewc=run.ewc) for run in runs]
        for name, runs in given.experiment.prepare(given).items()
    }
    given.experiment.run(given, plan)
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")


def test_the_sweep_over_levels_has_seeds_and_rows_of_its_own() -> None:
    given = options("--sweep levels")
    plan = given.experiment.prepare(given)
    assert {run.seed for row in plan.values() for run in row} == {100, 101, 102}
    periods = [plan[f"slow level every {n} steps"][0].model.levels[-1].chunk_size for n in (8, 32, 128)]
    assert periods == [8 * 128, 32 * 128, 128 * 128]
    assert plan["later only the slow level, every 8"][0].later == "slow"
    assert not {"mlp", "slow"} & {level.name for level in plan["fast levels only"][0].model.levels}


def test_only_the_slow_level_learns_later() -> None:
    """Undoing what it learned gives the loss after the first domain back, as nothing else has changed."""
    model = replace(continual.hope_model(16, 2), dim=16, num_layers=1)
    result = replace(TINY, model=model, later="slow").run(lambda _: None)
    effects = {one["level"]: one for one in result["effects"]}
    assert effects["mlp"]["change"] == 0 < effects["slow"]["change"]
    assert effects["slow"]["frozen"] == result["losses"][0][0]
    assert effects["slow"]["loss"] == result["losses"][-1][0] != result["losses"][0][0]
