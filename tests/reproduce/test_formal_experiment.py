"""The experiment on formal languages: its runs, its splits, its counting, and the cells of its table."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from nested_learning.commands.reproduce import parser
from nested_learning.data.padding import IGNORE
from nested_learning.data.synthetic.formal import FEW, LANGUAGES, formal_batch
from nested_learning.models.config import HopeConfig
from nested_learning.reproduce import formal
from nested_learning.reproduce.formal import STABLE, Best, FormalRun, all_right
from nested_learning.reproduce.lstm import LSTMConfig, LSTMModel


def options(line: str = "") -> Any:
    return parser().parse_args(["formal", *line.split()])


def lstm_run(**changes: Any) -> FormalRun:
    model = LSTMConfig(vocab_size=4, dim=8, num_layers=1)
    return replace(FormalRun(model=model, language="parity", length=20, strings=50, held_out=16), **changes)


def test_rows_are_the_mixers_and_chunks_they_name() -> None:
    given = options("--languages parity --lrs 0.01")
    plan = given.experiment.prepare(given)
    models = {label.split(" | ")[1]: runs[0].model for label, runs in plan.items()}
    assert list(models) == list(formal.ROWS)
    for chunk in (1, 2, 4, 8, 16):
        hope = models[f"HOPE, chunk {chunk}"]
        assert (hope.mixer, hope.chunk_size, hope.read) == ("self_mod", chunk, "after_write")
        assert hope.memory.eta_max == pytest.approx(STABLE / chunk)
    assert models["gated delta rule, η ≤ 2"].memory.eta_max == 2
    assert models["gated delta rule, η ≤ 1"].memory.eta_max is None
    assert models["attention"].mixer == "attention" and isinstance(models["LSTM"], LSTMConfig)
    assert {model.dim for model in models.values()} == {32}


def test_vocabularies_hold_tokens_and_classes() -> None:
    given = options("--lrs 0.01 --seeds 0")
    given.rows = ["LSTM"]
    runs = {label.split(" | ")[0]: cells[0] for label, cells in given.experiment.prepare(given).items()}
    sizes = {name: run.model.vocab_size for name, run in runs.items()}
    assert sizes == {
        "parity": 2,
        "(aa)*": 2,
        "(abab)*": 2,
        "a^n b^n": 3,
        "a^n b^n c^n": 4,
        "shuffle-2": 4,
    }


def test_the_bound_of_steps_keeps_a_linear_memory_from_growing_and_allows_a_reflection() -> None:
    torch.manual_seed(0)
    one = torch.eye(8, dtype=torch.float64)
    for _ in range(50):
        k, v = torch.nn.functional.normalize(torch.randn(2, 8, dtype=torch.float64), dim=-1)
        for eta in (0.0, STABLE / 2, STABLE):
            gain = one - 2 * eta * torch.outer(k, k) + eta * torch.outer(v, k)
            assert (gain @ k).norm() <= 1 + 1e-12
        turned = one - 2 * STABLE * torch.outer(k, k) - STABLE * torch.outer(k, k)
        torch.testing.assert_close(turned, one - 2 * torch.outer(k, k))
        grown = one - 3 * torch.outer(k, k)
        assert (grown @ k).norm() == pytest.approx(2)


class Knows(nn.Module):
    """Judges parity from the tokens, but is wrong after the third one of every row that begins with a 1."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, None]:
        even = (tokens.cumsum(1) + 1) % 2
        even[:, 2] ^= tokens[:, 0]
        return nn.functional.one_hot(even, 2).float(), None


def test_a_string_counts_only_if_every_position_is_right() -> None:
    language = LANGUAGES["parity"]
    strings = [[0, 1, 1, 0], [1, 1, 0], [1, 1], [0, 0]]
    tokens, classes = formal_batch([(s, language.judge(s)) for s in strings], 6)
    assert (classes[2, 2:] == IGNORE).all()
    assert all_right(Knows(), tokens, classes).tolist() == [True, False, True, True]


def test_the_last_of_the_best_weights_are_kept_and_perfection_has_to_last() -> None:
    model = nn.Linear(1, 1, bias=False)
    best = Best(model, times=2)
    told = []
    for weight, score in ((1.0, 0.5), (2.0, 1.0), (3.0, 0.9), (4.0, 1.0), (5.0, 1.0)):
        nn.init.constant_(model.weight, weight)
        told.append(best.update(score))
    assert told == [0.0, 0.5, 0.9, 0.9, 1.0] and best.score == 1.0
    nn.init.constant_(model.weight, 9.0)
    best.restore()
    assert model.weight.item() == 5.0


def test_stages_share_the_steps_and_the_bins_start_behind_the_training() -> None:
    run = lstm_run(steps=40, length=50)
    assert run.stages() == [(12, 10), (25, 10), (50, None)] and run.bins == ((2, 50), (51, 100))
    ticks: list[int] = []
    result = lstm_run(steps=12, eval_every=2).run(ticks.append)
    assert [stage[:2] for stage in result["stages"]] == [(5, 3), (10, 3), (20, 6)]
    assert sum(ticks) == result["steps"] == 12 and len(result["right"]) == 2


def test_a_stage_that_is_solved_leaves_its_steps_to_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FormalRun, "_right", lambda self, model, samples: len(samples))
    ticks: list[int] = []
    result = lstm_run(steps=40, eval_every=2).run(ticks.append)
    assert [stage[:2] for stage in result["stages"]] == [(5, 2), (10, 2), (20, 6)]  # SURE looks at the last
    assert sum(ticks) == 40 and result["right"] == [16, 16] and result["valid"] == 1.0


def test_neither_bins_nor_validation_are_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[set[tuple[int, ...]]] = []
    trained: list[set[tuple[int, ...]]] = []

    def right(self: FormalRun, model: nn.Module, samples: Any) -> int:
        asked.append({tuple(tokens) for tokens, _ in samples})
        return 0

    original = FormalRun._batches

    def batches(self: FormalRun, samples: Any, length: int) -> Any:
        trained.append({tuple(tokens) for tokens, _ in samples if len(tokens) > FEW})
        return original(self, samples, length)

    monkeypatch.setattr(FormalRun, "_right", right)
    monkeypatch.setattr(FormalRun, "_batches", batches)
    lstm_run(steps=4, length=60, strings=400, held_out=400).run(lambda _: None)
    *validations, short, long = asked
    assert len(validations) == len(trained) == 3
    for strings, validation in zip(trained, validations, strict=True):
        assert not strings & (validation | short | long) and not validation & {
            s for s in short if len(s) > FEW
        }
    assert len(trained[-1]) > 200


def test_other_seeds_train_at_the_rate_that_is_best_on_the_validation_split() -> None:
    given = options("--languages parity --rows LSTM --lrs 0.001 0.003 0.01 --seeds 3 4")
    valid = {0.001: (0.5, 10), 0.003: (1.0, 90), 0.01: (1.0, 40)}
    outcome = {
        label: [(run, dict(zip(("valid", "steps"), valid[run.optim.lr], strict=True))) for run in runs]
        for label, runs in given.experiment.prepare(given).items()
    }
    chosen = formal.other_seeds(given, outcome)
    assert [(run.optim.lr, run.seed) for run in chosen["parity | LSTM"]] == [(0.01, 3), (0.01, 4)]


def test_cells_are_medians_and_the_number_of_perfect_seeds() -> None:
    given = options("--languages parity --rows LSTM --lrs 0.01 --seeds 0 1 2 --held-out 10")
    rights = {0: [10, 10], 1: [10, 4], 2: [9, 8]}
    rest = {"valid": 1.0, "steps": 5, "stages": [], "seconds": 1.0, "nonfinite": 0, "parameters": 1234}
    first = given.experiment.prepare(given)
    outcome = {
        label: [(run, {"right": rights[run.seed], **rest}) for run in runs] for label, runs in first.items()
    }
    chosen = formal.other_seeds(given, outcome)
    outcome |= {
        label: [(run, {"right": rights[run.seed], **rest}) for run in runs] for label, runs in chosen.items()
    }
    report = formal.report(given, outcome)
    assert report.header == ["model", "parameters", "parity"]
    assert report.rows == [["LSTM", "1,234", "100 / 80 (2, 1)"]]
    assert report.numbers[0]["median"] == [1.0, 0.8]
    assert report.numbers[0]["perfect"] == pytest.approx([2 / 3, 1 / 3])


def test_the_lstm_is_a_causal_model_with_a_state() -> None:
    torch.manual_seed(0)
    model = LSTMModel(LSTMConfig(vocab_size=3, dim=8, num_layers=2))
    tokens = torch.randint(3, (2, 9))
    whole, _ = model(tokens)
    first, state = model(tokens[:, :4])
    rest, _ = model(tokens[:, 4:], state)
    torch.testing.assert_close(torch.cat([first, rest], 1), whole)
    with pytest.raises(ValueError, match=r"lstm\.dim must be at least 1, got 0"):
        LSTMConfig(vocab_size=3, dim=0, num_layers=1)


def test_batches_are_whole_chunks() -> None:
    model = HopeConfig(vocab_size=2, dim=8, num_layers=1, num_heads=1, chunk_size=16)
    run = lstm_run(model=model)
    samples = run._draw(random.Random(0), 5, (2, 20))
    assert next(run._batches(samples, 20))[0].shape == (16, 32)


def test_the_command_writes_table_and_picture(tmp_path: Path) -> None:
    given = options(f"--quick --jobs 1 --output {tmp_path}")
    plan = given.experiment.prepare(given)
    given.languages, given.rows = ["parity"], ["LSTM"]
    plan = given.experiment.plan(given)
    report = given.experiment.run(given, plan)
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")
    before = (tmp_path / "runs.jsonl").read_text()
    assert given.experiment.run(given, plan).markdown() == report.markdown()
    assert (tmp_path / "runs.jsonl").read_text() == before


@pytest.mark.slow
def test_reflections_track_parity_beyond_the_training_length(tmp_path: Path) -> None:
    """The delta rule with η ≤ 2, and not with η ≤ 1; half a minute."""
    given = options(f"--languages parity --lrs 0.005 --seeds 0 --jobs 1 --output {tmp_path}")
    given.rows = ["gated delta rule, η ≤ 2", "gated delta rule, η ≤ 1"]
    two, one = given.experiment.run(given, given.experiment.plan(given)).numbers
    assert two["median"] == [1.0, 1.0] and one["median"][1] < 0.5
