"""Loss by position and perplexities against a loop over tokens."""

from __future__ import annotations

import json
import math
import runpy
import statistics
import sys
from pathlib import Path

import pytest
import torch

from nested_learning.adapt import AdaptConfig, memorize
from nested_learning.data.corpus import bundled_files
from nested_learning.eval import perplexity, scorer
from nested_learning.eval.arms import Memorize
from nested_learning.eval.evaluation import evaluate
from nested_learning.eval.loading import Loaded
from nested_learning.eval.perplexity import (
    LongPerplexity,
    LongTexts,
    cut_spans,
    position_bins,
    read_documents,
)
from nested_learning.eval.samples import samples_path
from nested_learning.models.lm import HopeLM

ROOT = Path(__file__).parents[2]
LENGTH = 40
TEXT = "The quick brown fox jumps over the lazy dog. One dog sleeps all day, and the others bark. "


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT[:85] + "\n\f\n" + TEXT[20:70] + "\n\f\n" + "short")
    return path


def test_bins_cover_every_position_once():
    assert position_bins(10) == [(1, 1), (2, 2), (3, 4), (5, 8), (9, 10)]
    assert position_bins(1) == [(1, 1)]
    assert position_bins(8)[-1] == (5, 8)
    for length in (2, 7, 8, 9, 100):
        covered = [p for first, last in position_bins(length) for p in range(first, last + 1)]
        assert covered == list(range(1, length + 1))


def test_numbers_are_those_of_a_loop_over_tokens(loaded, text_file, tmp_path, monkeypatch):
    monkeypatch.setattr(scorer, "SEGMENT", 16)
    result = evaluate(
        LongPerplexity(loaded, LongTexts(files=(text_file,), length=LENGTH)), tmp_path / "a.json"
    )
    spans = [TEXT[:40], TEXT[20:60], TEXT[40:80]]  # the first of every document, then the second
    losses = []
    for span in spans:
        ids = [256, *span.encode()]
        one = []
        for n in range(1, len(ids)):
            with torch.no_grad():
                logits = loaded.model(torch.tensor([ids[:n]]))[0][0, -1]
            one.append(-logits.log_softmax(-1)[ids[n]].item())
        losses.append(one)
    found = {(m.task, m.name): m for m in result.metrics}
    nats, words = sum(map(sum, losses)), sum(len(span.split()) for span in spans)
    whole = {name: m.value for (task, name), m in found.items() if task == "all positions"}
    assert whole == {
        "perplexity per token": pytest.approx(math.exp(nats / 120), rel=1e-5),
        "perplexity per byte": pytest.approx(math.exp(nats / 120), rel=1e-5),
        "perplexity per word": pytest.approx(math.exp(nats / words), rel=1e-5),
    }
    for first, last in ((1, 1), (2, 2), (17, 32), (33, 40)):
        means = [statistics.fmean(one[first - 1 : last]) for one in losses]
        metric = found[f"positions {first}-{last}", "loss"]
        assert metric.value == pytest.approx(statistics.fmean(means), rel=1e-5)
        assert metric.stderr == pytest.approx(statistics.stdev(means) / math.sqrt(3), rel=1e-4)
    assert result.samples == 3
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_interval_of_a_ratio_is_that_of_its_mean_when_all_counts_are_equal():
    nats = [40.0, 50.0, 45.0, 61.0]
    metric = perplexity.perplexity("x", nats, [20] * 4, "baseline")
    mean, error = statistics.fmean(nats) / 20, statistics.stdev(nats) / 20 / 2
    assert metric.value == pytest.approx(math.exp(mean))
    assert metric.low == pytest.approx(math.exp(mean - 1.96 * error))
    assert metric.high == pytest.approx(math.exp(mean + 1.96 * error))


def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary(loaded, text_file, tmp_path):
    model = HopeLM(loaded.config.model).eval().requires_grad_(False)
    model.embedding.weight.zero_()
    if model.head is not None:
        model.head.weight.zero_()
    blank = Loaded(model=model, tokenizer=loaded.tokenizer, config=loaded.config, sha256="", path=tmp_path)
    result = evaluate(
        LongPerplexity(blank, LongTexts(files=(text_file,), length=LENGTH)), tmp_path / "a.json"
    )
    values = {m.name: m.value for m in result.metrics}
    assert values["perplexity per token"] == pytest.approx(257, rel=1e-5)
    assert values["loss"] == pytest.approx(math.log(257), rel=1e-5)


def test_learning_while_reading_scores_before_it_learns(loaded, text_file, tmp_path):
    adapt = AdaptConfig(lr=0.1, chunk_size=8, steps=2)
    arms = {}
    for gold in (False, True):
        plan = LongTexts(
            files=(text_file,),
            length=LENGTH,
            max_samples=1,
            memorize=Memorize(adapt=adapt, use_correct_answer=gold),
        )
        result = evaluate(LongPerplexity(loaded, plan), tmp_path / f"{gold}.json")
        arms |= {m.arm: m.value for m in result.metrics if m.name == "perplexity per token"}
    tokens = torch.tensor([[256, *TEXT[:40].encode()]])
    report, _ = memorize(loaded.model, tokens, config=adapt)
    assert arms["adapted"] == pytest.approx(math.exp(report.losses.mean().item()), rel=1e-5)
    assert arms["adapted, gold text"] < min(arms["adapted"], arms["baseline"])


@pytest.mark.parametrize("reset", [True, False])
def test_an_interrupted_evaluation_gives_the_same_file(loaded, text_file, tmp_path, monkeypatch, reset):
    how = Memorize(adapt=AdaptConfig(lr=0.5, chunk_size=8, reset=reset))
    plan = LongTexts(files=(text_file,), length=20, memorize=how)
    evaluate(LongPerplexity(loaded, plan), tmp_path / "whole.json")
    original, calls = LongPerplexity.score, []

    def score(self, spans):
        calls.append(spans)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(self, spans)

    with monkeypatch.context() as patch:
        patch.setattr(LongPerplexity, "score", score)
        with pytest.raises(KeyboardInterrupt):
            evaluate(LongPerplexity(loaded, plan), tmp_path / "cut.json")
    evaluate(LongPerplexity(loaded, plan), tmp_path / "cut.json")
    for suffix in (".json", ".samples.jsonl"):
        cut, whole = ((tmp_path / name).with_suffix(suffix).read_bytes() for name in ("cut.x", "whole.x"))
        assert cut == whole


def test_batches_change_nothing(loaded, text_file, tmp_path):
    plans = [LongTexts(files=(text_file,), length=LENGTH, batch_size=size) for size in (1, 3)]
    one, three = (
        evaluate(LongPerplexity(loaded, plan), tmp_path / f"{plan.batch_size}.json") for plan in plans
    )
    for a, b in zip(one.metrics, three.metrics, strict=True):
        assert a.value == pytest.approx(b.value, rel=1e-5)


def test_documents_of_files_and_of_the_package(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        json.dumps({"text": "one\ntwo"}) + "\n\n" + json.dumps({"text": "x"}) + "\n"
    )
    (tmp_path / "b.txt").write_text("three\n\f\nfour")
    found = read_documents([tmp_path / "a.jsonl", tmp_path / "b.txt"], 0.1)
    assert [text for text in found if text] == ["one\ntwo", "x", "three", "four"]
    ends = read_documents((), 0.05)
    texts = [path.read_text("utf-8") for path in bundled_files()]
    assert len(ends) >= len(texts)
    assert sum(map(len, ends)) == pytest.approx(0.05 * sum(map(len, texts)), rel=0.02)
    assert texts[-1].endswith(ends[-1])
    (tmp_path / "a.jsonl").write_text('{"txt": 1}\n')
    with pytest.raises(ValueError, match=r'a.jsonl, line 1: there must be a text in the field "text"'):
        read_documents([tmp_path / "a.jsonl"], 0.1)


def test_bad_input_is_refused(loaded):
    with pytest.raises(
        ValueError, match="length must be at most the 5 tokens of the longest document, got 40"
    ):
        cut_spans(["short", "x"], loaded.tokenizer, LongTexts(length=40))
    with pytest.raises(ValueError, match="length must be at least 1, got 0"):
        LongTexts(length=0)
    carry = Memorize(adapt=AdaptConfig(reset=False))
    with pytest.raises(
        ValueError, match="batch_size must be 1 where spans begin with what was learned, got 2"
    ):
        LongTexts(batch_size=2, memorize=carry)


def test_the_script_reads_the_bundled_text(exported, tmp_path, monkeypatch, capsys):
    output = tmp_path / "p.json"
    arguments = [
        "--checkpoint",
        str(exported),
        "--length",
        "64",
        "--max-samples",
        "3",
        "--output",
        str(output),
    ]
    monkeypatch.setattr(sys, "argv", ["long_perplexity.py", *arguments])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "scripts" / "eval" / "long_perplexity.py"), run_name="__main__")
    assert stop.value.code == 0
    assert "positions 33-64" in capsys.readouterr().out
    keys = [json.loads(line)["key"] for line in samples_path(output).read_text().splitlines()[1:]]
    assert len({key.split("/")[0] for key in keys}) == 3  # from three documents
