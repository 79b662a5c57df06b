"""The skeleton of every evaluation, with one that adds numbers up."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from nested_learning.adapt import AdaptConfig
from nested_learning.eval.arms import Memorize
from nested_learning.eval.evaluation import Evaluation, evaluate, figure_path
from nested_learning.eval.results import average, read_result
from nested_learning.eval.samples import samples_path

KEEPING = Memorize(adapt=AdaptConfig(reset=False))


@dataclass
class Adding:
    """Settings."""

    memorize: Memorize | None
    path: Path = Path("a")


class Sums(Evaluation[int]):
    """The sum of all numbers so far: state that every sample hands on to the next."""

    name = "sums"
    at_once = 2

    def __init__(self, loaded, memorize=KEEPING, stop_at=None, most=5):
        super().__init__(loaded, Adding(memorize), [(str(i), i) for i in range(most)])
        self.total, self.stop_at, self.scored, self.replayed = 0, stop_at, [], []

    def score(self, items):
        rows = []
        for item in items:
            if item == self.stop_at:
                raise KeyboardInterrupt
            self.scored.append(item)
            rows.append({"sum": self.learn(item)})
        return rows

    def replay(self, item):
        self.replayed.append(item)
        super().replay(item)

    def learn(self, item):
        self.total += item
        return self.total

    def metrics(self, rows):
        return [average("numbers", "sum", [row["sum"] for row in rows])]

    def draw(self, rows, result, output):
        figure_path(output, "baseline").write_text(f"{len(rows)} {result.samples}")


def test_an_evaluation_leaves_result_log_and_figure(loaded, tmp_path):
    result = evaluate(Sums(loaded), tmp_path / "s.json")
    assert result == read_result(tmp_path / "s.json")
    assert (result.evaluation, result.samples, result.metrics[0].value) == ("sums", 5, 4.0)  # 0 1 3 6 10
    assert result.settings == {"memorize": KEEPING.settings(), "path": "a"}
    assert result.checkpoint == loaded.describe()
    assert len(samples_path(tmp_path / "s.json").read_text().splitlines()) == 6
    assert (tmp_path / "s.png").read_text() == "5 5"


def test_an_interrupted_one_replays_whole_batches_and_gives_the_same_files(loaded, tmp_path):
    evaluate(Sums(loaded), tmp_path / "whole.json")
    with pytest.raises(KeyboardInterrupt):
        evaluate(Sums(loaded, stop_at=3), tmp_path / "cut.json")
    again = Sums(loaded)
    evaluate(again, tmp_path / "cut.json")
    assert (again.replayed, again.scored) == ([0, 1], [2, 3, 4])
    for suffix in (".json", ".samples.jsonl"):
        whole, cut = ((tmp_path / name).with_suffix(suffix) for name in ("whole.json", "cut.json"))
        assert whole.read_bytes() == cut.read_bytes()


@pytest.mark.parametrize("memorize", [None, replace(KEEPING, adapt=AdaptConfig())])
def test_without_anything_to_hand_on_nothing_is_learned_again(loaded, tmp_path, memorize):
    evaluate(Sums(loaded, memorize), tmp_path / "s.json")
    again = Sums(loaded, memorize)
    evaluate(again, tmp_path / "s.json")
    assert (again.replayed, again.scored, again.total) == ([0, 1, 2, 3, 4], [], 0)


def test_other_settings_are_refused_unless_fresh(loaded, tmp_path):
    evaluate(Sums(loaded), tmp_path / "s.json")
    with pytest.raises(ValueError, match=r"holds samples of another evaluation \(memorize was .*--fresh"):
        evaluate(Sums(loaded, None), tmp_path / "s.json")
    with pytest.raises(ValueError, match="checkpoint was .*, is 'other'"):
        evaluate(Sums(replace(loaded, sha256="other")), tmp_path / "s.json")
    fresh = Sums(loaded, None)
    evaluate(fresh, tmp_path / "s.json", fresh=True)
    assert fresh.scored == [0, 1, 2, 3, 4]


def test_a_file_that_cannot_be_a_result_is_refused_before_anything_is_scored(loaded, tmp_path):
    tried = Sums(loaded)
    with pytest.raises(ValueError, match=r"output must end in .json, got .*s\.txt"):
        evaluate(tried, tmp_path / "s.txt")
    assert tried.scored == [] and list(tmp_path.iterdir()) == []
