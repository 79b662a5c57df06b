"""Forgetting by hand, the loss matrix against plain forward passes, arms, and a kill."""

import json
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tolerances import tolerance
from torch.nn import functional as F

from nested_learning import HopeLM, load_checkpoint
from nested_learning.adapt import AdaptConfig
from nested_learning.commands.evaluation.continual import DEFAULT_SEGMENTS
from nested_learning.eval.arms import Memorize
from nested_learning.eval.continual import Continual, ContinualSettings
from nested_learning.eval.evaluation import evaluate
from nested_learning.eval.forgetting import (
    backward_transfer,
    final_average,
    forgetting,
    learned,
    negated,
)
from nested_learning.eval.loading import load
from nested_learning.eval.segments import Segment, Segments, Windows

SCORES = [  # by hand: rows after tasks 0, 1, 2
    [0.9, 0.1, 0.2],
    [0.95, 0.8, 0.1],
    [0.5, 0.7, 0.6],
]


def test_measures_by_hand() -> None:
    assert backward_transfer(SCORES) == pytest.approx(((0.5 - 0.9) + (0.7 - 0.8)) / 2)
    assert forgetting(SCORES) == pytest.approx(((0.95 - 0.5) + (0.8 - 0.7)) / 2)
    assert final_average(SCORES) == pytest.approx(0.6)
    assert learned(SCORES) == pytest.approx((0.9 + 0.8 + 0.6) / 3)


def test_of_losses_forgetting_is_a_rise() -> None:
    losses = negated([[1.0, 4.0], [1.5, 2.0]])
    assert forgetting(losses) == pytest.approx(0.5)
    assert backward_transfer(losses) == pytest.approx(-0.5)


def test_a_matrix_that_is_not_square_is_refused() -> None:
    for scores in ([[1.0]], [[1.0, 2.0]], [[1.0, 2.0], [1.0]]):
        with pytest.raises(ValueError, match="square matrix of at least two tasks"):
            forgetting(scores)


@pytest.fixture
def segments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Segments:
    monkeypatch.setenv("NESTED_LEARNING_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a.txt").write_text("The quick brown fox jumps over the lazy dog. " * 40)
    (tmp_path / "b.txt").write_text("0123456789 " * 200)
    parts = [Segment(name=name, files=(str(tmp_path / f"{name}.txt"),)) for name in "ab"]
    return Segments(segments=tuple(parts), valid_fraction=0.5)


WINDOWS = Windows(seq_len=24, batch_size=2, max_batches=2)


def evaluate_continual(paths, segments, windows, output, memorize=None, first=None):
    settings = ContinualSettings(checkpoints=paths, segments=segments, windows=windows, memorize=memorize)
    return evaluate(Continual(first or load(paths[0]), settings), output)


def checkpoints(run_folder: Path) -> list[Path]:
    found = sorted((run_folder / "checkpoints").glob("step_*"))
    assert len(found) >= 2
    return [found[0], found[-1]]


def test_cells_are_the_losses_of_plain_forward_passes(run_folder, segments, tmp_path) -> None:
    paths = checkpoints(run_folder)
    result = evaluate_continual(paths, segments, WINDOWS, tmp_path / "c.json")
    text = (tmp_path / "b.txt").read_text()
    held_out = text[text.index(" ", len(text) // 2) + 1 :]  # no word is cut
    tokens = torch.tensor([*held_out.encode(), 256])
    count = len(tokens) // 25
    rows = [tokens[at * 25 : at * 25 + 25] for at in (i * count // 4 for i in range(4))]
    for path in paths:
        model, _, _ = load_checkpoint(path)
        with torch.no_grad():
            expected = [F.cross_entropy(model(row[None, :-1])[0][0], row[1:]).item() for row in rows]
        (metric,) = [m for m in result.metrics if m.task == f"b after {path.name}"]
        mean, rounding = statistics.fmean(expected), tolerance(24 * 16, torch.float32, factor=0.1)
        assert metric.value == pytest.approx(mean, rel=rounding) and metric.n == 4
        assert metric.stderr == pytest.approx(statistics.stdev(expected) / 4**0.5, abs=rounding * mean)
    values = {m.task: m.value for m in result.metrics if m.name == "loss"}
    first, last = (values[f"a after {path.name}"] for path in paths)
    named = {m.name: m.value for m in result.metrics}
    assert named["forgetting"] == pytest.approx(last - first)
    assert named["backward transfer"] == pytest.approx(first - last)
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.thorough
def test_a_kill_changes_nothing_and_other_settings_are_refused(run_folder, segments, tmp_path) -> None:
    paths, output = checkpoints(run_folder), tmp_path / "c.json"
    kept = Memorize(adapt=AdaptConfig(lr=0.3, chunk_size=8, reset=False))
    evaluate_continual(paths, segments, WINDOWS, output, memorize=kept)
    first, log = output.read_bytes(), tmp_path / "c.samples.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(lines[:4]) + lines[4][:9])
    evaluate_continual(paths, segments, WINDOWS, output, memorize=kept)
    assert output.read_bytes() == first and log.read_text() == "".join(lines)
    with pytest.raises(ValueError, match="seq_len was 24, is 12"):
        evaluate_continual(paths, segments, replace(WINDOWS, seq_len=12), output, memorize=kept)


def test_learning_helps_on_text_that_repeats_and_gold_text_more(run_folder, segments, tmp_path) -> None:
    adapt = AdaptConfig(lr=1.0, chunk_size=8)
    one = replace(segments, segments=segments.segments[1:])
    means = {}
    for gold in (False, True):
        learning = Memorize(adapt=adapt, use_correct_answer=gold)
        output = tmp_path / f"{gold}.json"
        result = evaluate_continual([run_folder], one, WINDOWS, output, memorize=learning)
        means |= {metric.arm: metric.value for metric in result.metrics}
        assert len(result.metrics) == 2  # one checkpoint: nothing to forget
    assert means["adapted"] < means["baseline"] - 0.01
    assert means["adapted, gold text"] < means["adapted"] - 0.01


def test_a_random_model_is_at_chance(loaded, segments, tmp_path) -> None:
    """Guessing among all tokens costs ln V; tied logits of unit variance cost about half a nat more."""
    torch.manual_seed(0)
    random_model = HopeLM(loaded.config.model).eval()
    first = replace(loaded, model=random_model)
    result = evaluate_continual(["random"], segments, WINDOWS, tmp_path / "r.json", first=first)
    chance = torch.log(torch.tensor(257.0)).item()
    assert all(chance - 0.3 < metric.value < chance + 1.5 for metric in result.metrics)


def test_segments_from_yaml(tmp_path: Path) -> None:
    sample = Segments.read(DEFAULT_SEGMENTS)
    assert [segment.name for segment in sample.segments] == ["scripture", "plays", "speeches", "novel"]
    wrong = {
        "segments:\n  - {name: a, file: [x]}": "must hold segments with name",
        "segments:\n  - {name: a}": "segments.a must have either files or shards",
        "segments: []": "segments of different names",
        "parts: []": "must hold segments",
        "segments:\n  - {name: a, files: [x]}\n  - {name: a, files: [y]}": r"names, got \['a', 'a'\]",
    }
    for text, message in wrong.items():
        (tmp_path / "s.yaml").write_text(text)
        with pytest.raises(ValueError, match=message):
            Segments.read(tmp_path / "s.yaml")
    with pytest.raises(FileNotFoundError, match=r"bundled text must be one of novel\.txt"):
        Segment(name="a", files=("bundled:none.txt",)).tokens(None, 0.5)  # type: ignore[arg-type]


def test_results_hold_what_was_read(run_folder, segments, tmp_path) -> None:
    evaluate_continual([run_folder], segments, WINDOWS, tmp_path / "c.json")
    content = json.loads((tmp_path / "c.json").read_text())
    assert content["settings"]["seq_len"] == 24 and len(content["settings"]["texts"]) == 2
    assert content["samples"] == 4
