"""The tables: which runs make them, and that their cells are the runs' numbers."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import pytest

from nested_learning.commands.reproduce import parser
from nested_learning.layers.config import MemoryConfig
from nested_learning.models.config import HopeConfig
from nested_learning.reproduce import EXPERIMENTS, chunk_size, defaults, experiment, recall, stability
from nested_learning.reproduce.defaults import with_setting
from nested_learning.reproduce.tasks import RecallRun, TextRun


def options_of(line: str) -> argparse.Namespace:
    return parser().parse_args(line.split())


def plan_of(line: str) -> experiment.Plan:
    options = options_of(line)
    return options.experiment.prepare(options)


def invented(line: str, make) -> tuple[argparse.Namespace, experiment.Outcome]:
    """Options and an outcome whose results are `make(run)`, none of them run."""
    options = options_of(line)
    plan = options.experiment.prepare(options)
    return options, {label: [(run, make(run)) for run in runs] for label, runs in plan.items()}


def result(final: float | None, **more) -> dict:
    base = {"nonfinite": 0, "max_norm": 2.0, "median_norm": 0.5, "parameters": 1, "steps": 50, "solved": None}
    return {**base, "final": final, "curve": [(50, final)], "norms": [1.0], "unigram_entropy": 5.0, **more}


def test_recall_rows_are_the_models_and_reads_asked_for() -> None:
    plan = plan_of("recall")
    assert list(plan) == [
        *(f"{recall.FIVE} | {read}" for read in ("chunk", "after_write", "before_write")),
        *(f"{recall.ONE} | {read}" for read in ("chunk", "after_write", "before_write")),
        f"{recall.ATTENTION} | -",
    ]
    one = plan[f"{recall.ONE} | after_write"]
    assert [run.seed for run in one] == [0, 1, 2] and one[0].steps == 1500
    assert one[0].model.memory.adaptive == () and one[0].model.read == "after_write"
    assert plan[f"{recall.FIVE} | chunk"][0].model.memory.adaptive == ("k", "v", "eta", "alpha")
    assert plan["attention | -"][0].model.mixer == "attention"


def test_recall_cells_are_accuracies_and_their_mean() -> None:
    finals = {0: 0.9, 1: 1.0, 2: 0.5}
    options, outcome = invented("recall --reads chunk", lambda run: result(finals[run.seed], solved=50))
    report = recall.report(options, outcome)
    assert report.rows[0] == [
        recall.FIVE,
        "chunk",
        "0.900",
        "1.000",
        "0.500",
        "0.800",
        "50, 50, 50",
        "50, 50, 50",
    ]
    assert report.numbers[0]["mean"] == pytest.approx(0.8)


def test_chunk_sizes_are_compared_at_equal_tokens_with_the_largest_chunk() -> None:
    losses = {64: 4.0, 32: 4.0, 16: 3.0, 8: 5.0}
    options, outcome = invented("chunk-size", lambda run: result(losses[run.model.chunk_size]))
    runs = [run for cells in outcome.values() for run, _ in cells]
    assert len(runs) == 8 and {run.seq_len * run.batch_size for run in runs} == {2048}
    report = chunk_size.report(options, outcome)
    assert [row[4] for row in report.rows[:4]] == ["+0.00%", "+0.00%", "-25.00%", "+25.00%"]
    assert [row[:2] for row in report.rows[::4]] == [["256", "64"], ["1024", "64"]]


def test_a_loss_that_is_not_finite_is_said_to_be_so() -> None:
    options, outcome = invented(
        "chunk-size --lengths 256",
        lambda run: result(None if run.model.chunk_size == 8 else 4.0, nonfinite=3),
    )
    row = chunk_size.report(options, outcome).rows[3]
    assert row == ["256", "8", "not finite", "not finite", "not finite", "2.00", "3"]


def test_lengths_must_divide_the_tokens_of_a_step() -> None:
    with pytest.raises(ValueError, match="lengths must divide tokens = 2048, got 300"):
        plan_of("chunk-size --lengths 300")


def test_stability_runs_every_model_chunk_and_rate_and_shows_the_worst_seed() -> None:
    line = "stability --chunks 4 64 --lrs 3e-3 3e-2 --seeds 0 1"
    options, outcome = invented(
        line, lambda run: result(4.0 + run.seed, nonfinite=run.seed, max_norm=run.model.chunk_size)
    )
    assert len(outcome) == len(stability.ROWS) * 4
    (first, second) = (
        run for run, _ in outcome["hope_linear memory.eta_max=2 memory.eta_bias=0 | 64 | 0.03"]
    )
    assert (first.seed, second.seed, first.optim.lr, first.model.chunk_size) == (0, 1, 0.03, 64)
    assert (first.model.mixer, first.model.memory.eta_max) == ("self_mod_linear", 2)
    report = stability.report(options, outcome)
    assert report.rows[1] == ["HOPE", "4", "0.03", "1", "4.00", "0.500", "5.0000"]
    lost = {label: [(run, result(None)) for run, _ in cells] for label, cells in outcome.items()}
    assert stability.report(options, lost).rows[1][-1] == "not finite"


def test_settings_change_what_they_name_and_nothing_else() -> None:
    base = HopeConfig()
    changed = with_setting(base, "read=after_write memory.adaptive=[k,v] memory.eta_bias=-1")
    memory = MemoryConfig(adaptive=("k", "v"), eta_bias=-1.0)
    assert changed == HopeConfig(read="after_write", memory=memory)
    assert with_setting(base, "default") == base
    with pytest.raises(ValueError, match=r"unknown key 'model\.memory\.eta_bais'"):
        with_setting(base, "memory.eta_bais=-1")
    with pytest.raises(ValueError, match="got 'read'"):
        with_setting(base, "read")


def test_every_setting_of_the_table_is_valid_and_repeats_of_the_default_are_left_out() -> None:
    plan = plan_of("defaults")
    default = MemoryConfig()
    assert len(plan) > 10
    assert default.eta_bias is None
    assert [type(run) for run in plan["memory.delta=false"]] == [TextRun, RecallRun]


def test_defaults_cells_are_those_of_their_task() -> None:
    def make(run) -> dict:
        off = not run.model.memory.delta
        return result((0.25 if off else 1.0) if isinstance(run, RecallRun) else (6.0 if off else 4.0))

    options = options_of("defaults --seeds 0 1")
    options.settings = ["memory.delta=false", "chunk_size=64"]
    plan = options.experiment.prepare(options)
    outcome = {label: [(run, make(run)) for run in runs] for label, runs in plan.items()}
    rows = defaults.report(options, outcome).rows
    assert rows[0] == ["`default`", "1.000", "-, -", "4.0000", "+0.00%", "2.00", "0"]
    assert rows[1] == ["`memory.delta=false`", "0.250", "-, -", "6.0000", "+50.00%", "2.00", "0"]
    assert rows[2][1:3] == ["-", "-"]


def test_quick_replaces_options_and_folder() -> None:
    for one in EXPERIMENTS:
        options = options_of(f"{one.name} --quick")
        assert sum(run.steps for runs in one.prepare(options).values() for run in runs) <= 60


def test_running_writes_numbers_that_match_the_runs_and_resumes(tmp_path: Path, capsys) -> None:
    options = options_of(f"recall --steps 1 --seeds 0 --reads chunk --jobs 1 --output {tmp_path}")
    full = options.experiment.prepare(options)
    plan = {label: [replace(r, batch_size=2, eval_batches=1) for r in runs] for label, runs in full.items()}
    report = options.experiment.run(options, plan)
    first = (tmp_path / "runs.jsonl").read_text()
    finals = [json.loads(line)["result"]["final"] for line in first.splitlines()]
    written = json.loads((tmp_path / "results.json").read_text())
    assert [row["mean"] for row in written["rows"]] == finals and len(finals) == 3
    assert (tmp_path / "results.md").read_text() == report.markdown()
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")
    options.experiment.run(options, plan)
    assert (tmp_path / "runs.jsonl").read_text() == first  # nothing ran again
    assert report.markdown() in capsys.readouterr().out


@pytest.mark.slow
def test_a_thousand_steps_stay_finite(tmp_path: Path) -> None:
    line = "stability --models hope --chunks 32 --lrs 3e-3 9e-3 --steps 1000 --length 256 --batch 8"
    options = options_of(f"{line} --output {tmp_path}")
    report = options.experiment.run(options, options.experiment.prepare(options))
    assert len(report.numbers) == 2
    for row in report.numbers:
        assert row["steps"] == [1000] and row["nonfinite"] == 0, row
        assert row["final"] is not None and row["final"] < 5.0, row
