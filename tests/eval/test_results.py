"""Result files, intervals, and tables of results."""

import math

import pytest

from nested_learning.eval.results import (
    EvaluationResult,
    Metric,
    average,
    proportion,
    read_result,
    summarise,
    versions,
    wilson,
    write_result,
)


def result(metrics):
    return EvaluationResult(
        evaluation="toy",
        checkpoint={"name": "run"},
        settings={"n": 20},
        versions={"torch": "x"},
        metrics=metrics,
        samples=20,
    )


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(15, 20, 0.5313, 0.8881), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (1, 1, 0.2065, 1.0)],
)
def test_wilson_interval_against_published_numbers(successes, n, low, high):
    assert wilson(successes, n) == pytest.approx((low, high), abs=1e-4)


def test_wilson_solves_its_quadratic_equation():
    p, n, z = 37 / 120, 120, 1.959963984540054
    for bound in wilson(37, 120):
        assert (p - bound) ** 2 == pytest.approx(z * z * bound * (1 - bound) / n, rel=1e-9)


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (5, 4), (-1, 4)])
def test_wilson_refuses_what_is_no_proportion(successes, n):
    with pytest.raises(ValueError, match=f"{successes} of {n}"):
        wilson(successes, n)


def test_average_is_mean_and_standard_error():
    metric = average("t", "loss", [1.0, 2.0, 4.0])
    stderr = math.sqrt(((4 / 3) ** 2 + (1 / 3) ** 2 + (5 / 3) ** 2) / 2 / 3)
    assert metric.value == pytest.approx(7 / 3)
    assert metric.stderr == pytest.approx(stderr)
    assert (metric.low, metric.high) == pytest.approx(
        (7 / 3 - 1.96 * stderr, 7 / 3 + 1.96 * stderr), rel=1e-4
    )
    assert average("t", "loss", [1.0]).low is None


def test_a_result_comes_back_and_is_summarised(tmp_path):
    written = result([proportion("piqa", "acc", 15, 20, 0.5), Metric(task="t", name="loss", value=2.5)])
    write_result(tmp_path / "a.json", written)
    assert read_result(tmp_path / "a.json") == written
    lines = summarise([tmp_path / "a.json", tmp_path / "a.json"]).splitlines()
    assert len(lines) == 6
    cells = [cell.strip() for cell in lines[2].split("|")[1:-1]]
    assert cells == ["run", "toy", "piqa", "acc", "baseline", "0.7500", "0.5313 to 0.8881", "0.5", "20"]


def test_bad_results_are_refused(tmp_path):
    with pytest.raises(ValueError, match="arm must be one of"):
        Metric(task="t", name="x", value=0, arm="best")
    with pytest.raises(ValueError, match="end in .json"):
        write_result(tmp_path / "a.txt", result([]))
    with pytest.raises(ValueError, match="JSON"):
        write_result(tmp_path / "a.json", result([Metric(task="t", name="x", value=float("nan"))]))
    assert not (tmp_path / "a.json").exists()
    (tmp_path / "b.json").write_text("{}")
    with pytest.raises(ValueError, match="no result file"):
        read_result(tmp_path / "b.json")


def test_versions_name_packages_and_commit():
    found = versions("numpy")
    assert {"python", "torch", "nested_learning", "git", "numpy"} == found.keys()
    assert found["git"] == "unknown" or len(found["git"]) == 40
