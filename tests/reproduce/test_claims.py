"""Experiments on the paper's claims: their rows, what they measure, and that their cells are the runs'."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nested_learning.commands.reproduce import parser
from nested_learning.eval.perplexity import position_bins
from nested_learning.models.bill import count_parameters
from nested_learning.models.config import HopeConfig
from nested_learning.models.lm import HopeLM
from nested_learning.reproduce import ablation, context, linear_memory
from nested_learning.reproduce.contenders import CONTENDERS, state_size
from nested_learning.reproduce.experiment import Outcome
from nested_learning.reproduce.tasks import RecallRun

BASE = HopeConfig(vocab_size=64, dim=32, num_layers=2, num_heads=2, chunk_size=8)


def invented(line: str, make: Any) -> tuple[argparse.Namespace, Outcome]:
    """Options and an outcome whose results are `make(label, run)`, none of them run."""
    options = parser().parse_args(line.split())
    plan = options.experiment.prepare(options)
    return options, {label: [(run, make(label, run)) for run in runs] for label, runs in plan.items()}


def result(final: float | None, **more: Any) -> dict[str, Any]:
    base = {"parameters": 1234, "unigram_entropy": 5.0, "bytes_per_token": 2.5, "solved": None}
    return {**base, "final": final, **more}


# ablation


def test_ablation_rows_differ_from_their_full_model_in_what_they_name() -> None:
    options = parser().parse_args(["ablation", "--bases", "paper", "ours"])
    plan = options.experiment.prepare(options)
    models = {label: runs[0].model for label, runs in plan.items()}
    assert [run.seed for run in plan[f"{ablation.PAPER} | full"]] == [0, 1, 2]
    paper, ours = (models[f"{base} | full"] for base in (ablation.PAPER, ablation.OURS))
    assert paper.memory.momentum and paper.memory.adaptive == ("k", "v", "q", "eta", "alpha")
    assert not ours.memory.momentum and "q" not in ours.memory.adaptive
    off = models[f"{ablation.PAPER} | − delta rule"]
    assert not off.memory.delta and off.memory.adaptive == paper.memory.adaptive
    assert not models[f"{ablation.PAPER} | − momentum"].memory.momentum
    assert "v" not in models[f"{ablation.PAPER} | − adaptive v"].memory.adaptive
    assert models[f"{ablation.OURS} | + momentum"].memory.momentum
    assert models[f"{ablation.OURS} | − output gate"].output_gate is False
    assert models[f"{ablation.OURS} | − convolution"].conv_window == 1
    for base, full in ((ablation.PAPER, paper), (ablation.OURS, ours)):
        own = [str(model.to_dict()) for label, model in models.items() if label.startswith(base)]
        assert len(set(own)) == len(own) >= 8  # no row says what another does
        plain = models[f"{base} | {ablation.NO_CMS}"]
        assert [level.name for level in full.levels] == ["fast", "mlp"]
        assert [plain.level_kind(level) for level in plain.levels] == ["plain"]
        assert count_parameters(full) <= count_parameters(plain) < 1.02 * count_parameters(full)


def test_ablation_cells_are_changes_of_perplexity_by_seed_beside_the_papers() -> None:
    worse = {"− delta rule": (0.1, 0.2), "− momentum": (0.1, -0.1), "− adaptive q": (0.3, 0.1)}

    def make(label: str, run: Any) -> dict[str, Any]:
        change = worse.get(label.split(" | ")[1], (0.0, 0.0))[run.seed]
        return result(None if "CMS" in label else 4.0 + run.seed + change)

    options, outcome = invented("ablation --seeds 0 1 --bases paper", make)
    report = ablation.report(options, outcome)
    rows = {row[1]: row for row in report.rows}
    numbers = {row["change"]: row for row in report.numbers}
    assert rows["full"][4:] == ["-", "-", "-"]
    changes = numbers["− delta rule"]["perplexity_change"]
    assert changes == pytest.approx([math.exp(0.1) - 1, math.exp(0.2) - 1])
    assert numbers["− delta rule"]["papers_change"] == pytest.approx(13.41 / 12.24 - 1)
    assert rows["− delta rule"][4].startswith(f"{50 * (math.exp(0.1) + math.exp(0.2) - 2):+.2f} ±")
    assert rows["− delta rule"][5:] == ["+9.6 %", "same"]
    assert rows["− momentum"][6] == "open (1 of 2)"
    assert rows["− adaptive q"][5:] == ["-0.4 %", "opposite"]
    assert rows[ablation.NO_CMS][3:] == ["not finite", "not finite", "+6.5 %", "-"]


def test_adding_a_part_is_the_inverse_of_the_papers_removing_it() -> None:
    options, outcome = invented("ablation --seeds 0 --bases ours", lambda label, run: result(4.0))
    claims = {row["change"]: row["papers_change"] for row in ablation.report(options, outcome).numbers}
    assert claims["+ momentum"] == pytest.approx(12.24 / 13.58 - 1)
    assert claims["+ adaptive q"] == pytest.approx(12.24 / 12.19 - 1)
    assert claims["− output gate"] is None and claims["full"] is None


# context


class Counter(nn.Module):
    """Its loss at a token is that of a uniform guess among as many tokens as it has read, at least 2."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, tokens: Tensor, state: int | None = None, **_: Any) -> tuple[Tensor, int]:
        before = state or 0
        read = torch.arange(before + 1, before + tokens.shape[1] + 1)
        logits = torch.zeros(*tokens.shape, 64)
        logits.masked_fill_(torch.arange(64) >= read[:, None].clamp(2, 64), -torch.inf)
        return logits, before + tokens.shape[1]


def test_loss_after_a_context_is_that_of_the_last_tokens_only() -> None:
    model: Any = Counter()
    spans = torch.randint(2, (20, 41))
    for asked, size in ((1, 20), (4, 9)):
        expected = [math.log(max(2, size + number + 1)) for number in range(asked)]
        found = context.loss_after(model, spans, size, asked)
        assert found == pytest.approx(sum(expected) / asked, rel=1e-6)


def test_losses_by_position_are_means_of_the_bins() -> None:
    model: Any = Counter()
    found = context.losses_by_position(model, torch.randint(2, (3, 41)))
    losses = [math.log(max(2, read)) for read in range(1, 41)]
    bins = position_bins(40)
    expected = [sum(losses[first - 1 : last]) / (last - first + 1) for first, last in bins]
    assert found == pytest.approx(expected, rel=1e-6)


def test_spans_come_from_documents_in_turn_and_never_cross_them() -> None:
    documents = [[1] * 25 + [0], [2] * 9 + [0], [3] * 12 + [0]]
    tokens = np.array([token for document in documents for token in document], np.uint16)
    corpus: Any = SimpleNamespace(valid=tokens, tokenizer=SimpleNamespace(eos_id=0))
    spans = context.held_out_spans(corpus, 10, 9)
    assert [sorted(set(span.tolist())) for span in spans] == [[1], [3], [1]]
    assert spans.shape == (3, 11) and len(context.held_out_spans(corpus, 10, 2)) == 2
    with pytest.raises(ValueError, match="spans of 41 tokens are longer than the longest .*, 26"):
        context.held_out_spans(corpus, 40, 1)


def test_context_models_are_of_one_size_and_read_up_to_four_times_their_length() -> None:
    options = parser().parse_args(["context", "--seeds", "3", "--length", "32"])
    plan = options.experiment.prepare(options)
    assert list(plan) == ["HOPE", "Titans", "gated delta rule", "sliding attention", "Transformer"]
    sizes = [count_parameters(runs[0].text.model) for runs in plan.values()]
    assert max(sizes) < 1.02 * min(sizes)
    run = plan["sliding attention"][0]
    assert run.text.model.window == 16 and run.contexts == (8, 16, 32, 64, 128) and run.text.seed == 3


def test_context_cells_are_losses_by_context_and_the_change_beyond_training() -> None:
    losses = {"HOPE": [5.0, 4.0, 3.0], "Transformer": [5.0, 4.0, 6.0]}

    def make(label: str, run: Any) -> dict[str, Any]:
        by_context = [loss + run.text.seed for loss in losses[label]]
        return result(4.5, by_context=by_context, by_bin=[1.0], spans=7)

    line = "context --models hope transformer --multiples 0.5 1 4 --seeds 0 1 --length 32"
    options, outcome = invented(line, make)
    report = context.report(options, outcome)
    assert report.header[3:] == ["16 tokens", "32 tokens", "128 tokens", "beyond 32"]
    assert [row[5].split(" ")[0] for row in report.rows] == ["3.5000", "6.5000"]
    assert [row[6] for row in report.rows] == ["-1.0000 ± 0.0000", "+2.0000 ± 0.0000"]
    assert report.plot is not None and report.plot.lines[0] == (
        "HOPE",
        [(16.0, 5.0), (32.0, 4.0), (128.0, 3.0)],
    )


# linear


def test_hidden_width_is_the_one_whose_state_is_nearest() -> None:
    model = CONTENDERS["titans"].build(BASE)
    for numbers in (2_000, 3_000):
        found = linear_memory.with_state(model, numbers)

        def distance(hidden: int, numbers: int = numbers) -> int:
            with_hidden = HopeConfig.from_dict(model.to_dict())
            with_hidden.memory.hidden = hidden
            return abs(state_size(with_hidden, 0) - numbers)

        assert found.memory.hidden == min(range(5, 25), key=distance)


def test_titans_has_exactly_the_state_of_the_gated_delta_rule() -> None:
    models = linear_memory.models(BASE, ["titans"], [1, 2])
    state = {row: state_size(model, 0) for row, model in models.items()}
    for heads in (1, 2):
        linear, two, default = (
            linear_memory.Row(pair="titans", heads=heads, memory=memory)
            for memory in (linear_memory.LINEAR, linear_memory.TWO, linear_memory.DEFAULT)
        )
        assert state[linear] == state[two] < state[default]
        assert models[two].memory.hidden == 32 // heads // 2
    sizes = [count_parameters(model) for model in models.values()]
    assert max(sizes) - min(sizes) <= 2 * 3 * 8 * 32  # 8 more hidden units in every MLP


def test_linear_cells_are_differences_to_the_linear_memory() -> None:
    text = {"linear": 4.0, "two layers": 3.9, "two layers, default width": 3.8}

    def make(label: str, run: Any) -> dict[str, Any]:
        if isinstance(run, RecallRun):
            return result(0.75, solved=50 if run.seed else None)
        return result(text[label.split(" | ")[2]] + run.seed)

    options, outcome = invented("linear --pairs titans --head-counts 2 --seeds 0 1", make)
    report = linear_memory.report(options, outcome)
    assert [row[6] for row in report.rows] == ["-", "-0.1000 ± 0.0000", "-0.2000 ± 0.0000"]
    assert [row[8] for row in report.rows] == ["0.750 ± 0.000"] * 3
    assert report.rows[0][9] == "-, 50" and report.numbers[1]["to_linear"] == pytest.approx([-0.1, -0.1])


# options of text


def test_own_text_is_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NESTED_LEARNING_CACHE", str(tmp_path / "cache"))
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{n} times {n} is {n * n}.\n" for n in range(400)))
    options = parser().parse_args(f"context --data bytes --text {text} --quick --models titans".split())
    (run,) = options.experiment.prepare(options)["Titans"]
    assert run.text.data.files == (str(text),) and run.text.model.vocab_size == 257
    assert run.run(lambda steps: None)["by_context"][0] > 0


def test_training_hands_out_the_model_that_it_reports() -> None:
    options = parser().parse_args(["context", "--quick", "--models", "titans"])
    (run,) = options.experiment.prepare(options)["Titans"]
    model, said = run.text.trained(lambda steps: None)
    assert isinstance(model, HopeLM) and said["final"] == run.text.run(lambda steps: None)["final"]
