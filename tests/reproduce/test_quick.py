"""Every experiment from its first run to its table, at the size of `--quick`.

Those in `ELSEWHERE` do so in a test of their own, which looks at more.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nested_learning.commands.reproduce import parser
from nested_learning.reproduce import EXPERIMENTS

ELSEWHERE = {"continual", "memorize", "needle", "formal", "mad", "mqar", "fig4", "orthogonal"}


@pytest.mark.thorough
@pytest.mark.parametrize("name", [one.name for one in EXPERIMENTS if one.name not in ELSEWHERE])
def test_a_quick_run_ends_with_a_table_of_all_its_runs(name: str, tmp_path: Path, capsys) -> None:
    options = parser().parse_args(f"{name} --quick --jobs 1 --device cpu --output {tmp_path}".split())
    experiment = options.experiment
    plan = experiment.prepare(options)
    report = experiment.run(options, plan)
    kept = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    distinct = {(type(run).__name__, repr(run)) for runs in plan.values() for run in runs}
    assert len(kept) >= len(distinct) > 0
    assert json.loads((tmp_path / "results.json").read_text())["rows"]
    assert report.rows and report.markdown() in capsys.readouterr().out
    assert (tmp_path / "results.md").read_text().count("|") > len(report.rows)
