"""The memorisation experiment: its texts, its choice of settings, and its table."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nested_learning.adapt import AdaptConfig
from nested_learning.commands.reproduce import parser
from nested_learning.reproduce import memorize
from nested_learning.reproduce.memorize import MODEL, MemorizeRun, ModelRun, best, change

RUN = MemorizeRun(checkpoint="none", model="0", adapt=AdaptConfig(), passages=3, length=10, half=0)


def result(passage: list[list[float]], other: list[list[float]]) -> dict[str, Any]:
    return {"passage": passage, "other": other, "learning": passage[0], "unchanged": True}


def test_passages_and_other_text_of_both_halves_do_not_overlap() -> None:
    held_out = np.arange(500, dtype=np.uint16)
    texts = [text for half in (0, 1) for text in replace(RUN, half=half).texts(held_out)]
    assert [tuple(text.shape) for text in texts] == [(3, 11)] * 4
    assert len(torch.cat(texts).unique()) == 4 * 3 * 11


def test_change_is_the_mean_over_passages_with_its_interval() -> None:
    mean, width = change(result([[4.0, 2.0], [3.0, 1.8], [0.0, 0.0]], []), "passage")
    assert mean == pytest.approx((-25 - 10) / 2)
    assert width == pytest.approx(1.96 * np.std([-25, -10], ddof=1) / np.sqrt(2))


def test_the_best_setting_falls_most_among_those_that_leave_other_text_alone() -> None:
    def row(*changes: tuple[float, float]) -> list[tuple[Any, Any]]:
        return [
            (i, result([[1.0], [1 + a / 100]], [[1.0], [1 + b / 100]])) for i, (a, b) in enumerate(changes)
        ]

    assert best(row((-10, 0.1), (-20, 0.7), (-50, 3.0))) == 1
    assert best(row((-50, 3.0), (-30, 2.0))) == 1


def test_a_given_model_is_used_and_known_by_its_time(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no checkpoint"):
        options(f"--checkpoint {tmp_path}/none").experiment.prepare(options(f"--checkpoint {tmp_path}/none"))
    file = tmp_path / "model.pt"
    file.touch()
    given = options(f"--checkpoint {file}")
    ((run,),) = given.experiment.prepare(given).values()
    assert run == ModelRun(checkpoint=str(file), modified=file.stat().st_mtime_ns)
    trained = options("--quick")
    ((run,),) = trained.experiment.prepare(trained).values()
    assert run == ModelRun(checkpoint="outputs/reproduce/memorize-quick/pilot_smoke", train_steps=2)


def options(line: str) -> Any:
    return parser().parse_args(["memorize", *line.split()])


def test_chosen_settings_are_measured_on_the_other_half() -> None:
    given = options("--passages 2")
    outcome: Any = {MODEL: [(ModelRun(checkpoint="run", train_steps=1), {"checksum": "abc"})]}
    chosen = memorize.choose(given, outcome)
    assert [len(row) for row in chosen.values()] == [1, 9, 9, 9, 9]
    flat = [run for row in chosen.values() for run in row]
    assert {(run.checkpoint, run.model, run.half, run.readings) for run in flat} == {("run", "abc", 0, 2)}
    assert chosen["choose | nothing"][0].adapt.lr == 0

    def invented(run: MemorizeRun) -> dict[str, Any]:
        fall = run.adapt.lr * run.adapt.steps
        rounds = range(run.readings)
        return result(
            [[4.0 - 0.01 * r * fall] * 2 for r in rounds], [[4.0 + 0.002 * r * fall] * 2 for r in rounds]
        )

    outcome |= {label: [(run, invented(run)) for run in row] for label, row in chosen.items()}
    final = memorize.measure(given, outcome)
    assert list(final) == [f"measure | {name}" for name in ("nothing", "titan", "cms_fast", "cms", "all")]
    assert all(run.half == 1 and run.readings == 4 for row in final.values() for run in row)
    (cms,) = final["measure | cms"]
    assert (cms.adapt.paths, cms.adapt.lr, cms.adapt.steps) == ("cms", 0.5, 4)
    outcome |= {label: [(run, invented(run)) for run in row] for label, row in final.items()}
    report = memorize.report(given, outcome)
    cells = "cms|0.5|4|4.0000|3.9800|-0.50 ± 0.00|4.0000|4.0040|+0.10 ± 0.00|unchanged"
    assert report.rows[3] == cells.split("|")
    assert len(report.numbers) == 37 + 5


@pytest.mark.slow
def test_a_trained_model_remembers_a_passage(tmp_path: Path) -> None:
    """The whole experiment at its quick size: four memories that remember, one that does not."""
    given = options(f"--quick --jobs 1 --output {tmp_path}")
    report = given.experiment.run(given, given.experiment.prepare(given))
    measured = {row["path"]: row for row in report.numbers if row["part"] == "measure"}
    assert all(row["unchanged"] for row in report.numbers)
    assert abs(measured["nothing"]["passage_change"][0]) < 1
    for path in ("titan", "cms_fast", "cms", "all"):
        assert measured[path]["passage_change"][0] < -20
        assert measured[path]["other_change"][0] < 1
    assert (tmp_path / "results.png").stat().st_size > 10_000
