"""What the two tasks report is what a computation by hand gives."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from nested_learning.data.config import DataConfig, TokenizerConfig
from nested_learning.data.corpus import prepare_corpus
from nested_learning.data.synthetic.recall import recall_batch
from nested_learning.models.config import HopeConfig
from nested_learning.models.lm import HopeLM
from nested_learning.optim.config import OptimConfig
from nested_learning.reproduce.tasks import RecallRun, TextRun, pilot_run, recall_accuracy

TINY = HopeConfig(vocab_size=16, dim=8, num_layers=1, num_heads=2, chunk_size=4, mixer="attention")


def accuracy_by_hand(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> float:
    right = asked = 0
    for tokens, targets in batches:
        logits = model(tokens)[0]
        for row in range(tokens.shape[0]):
            for t in range(tokens.shape[1]):
                if targets[row, t] >= 0:
                    asked += 1
                    right += max(range(logits.shape[-1]), key=lambda v: logits[row, t, v]) == targets[row, t]
    return right / asked


class Half(nn.Module):
    """Knows the value of every even key, and answers 0 to the others."""

    def forward(self, tokens: Tensor) -> tuple[Tensor, None]:
        logits = torch.zeros(*tokens.shape, 16)
        for row, sequence in enumerate(tokens.tolist()):
            stated = len(sequence) // 2
            values = dict(zip(sequence[:stated:2], sequence[1:stated:2], strict=True))
            for t, token in enumerate(sequence):
                logits[row, t, values[token] if token % 2 == 0 and token in values else 0] = 1.0
        return logits, None


def test_accuracy_of_a_model_that_knows_half_the_keys() -> None:
    batches = [recall_batch(16, 8, 16, torch.Generator().manual_seed(s)) for s in (0, 1)]
    assert recall_accuracy(Half(), batches) == 0.5  # 8 pairs of 8 keys: every key is asked once


def test_recall_result_is_that_of_the_trained_model() -> None:
    run = RecallRun(model=TINY, steps=3, pairs=4, batch_size=4, eval_every=2, eval_batches=1, seed=7)
    result = run.run(lambda steps: None)

    torch.manual_seed(7)
    model, data = HopeLM(TINY), torch.Generator().manual_seed(21)
    decayed = [p for n, p in model.named_parameters() if p.ndim == 2 and "embedding" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim < 2 or "embedding" in n]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    losses = []
    for step in range(3):
        tokens, targets = recall_batch(4, 4, 16, data)
        logits = model(tokens)[0]
        loss = -logits.log_softmax(-1)[targets >= 0].gather(-1, targets[targets >= 0][:, None]).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (step + 1) / 50
        optimizer.step()
        losses.append(loss.item())
    assert result["losses"] == pytest.approx(losses, rel=1e-4)
    assert result["final"] == accuracy_by_hand(model, run.batches(2, 1))
    assert [step for step, _ in result["curve"]] == [2, 3]
    assert result["curve"][1][1] == accuracy_by_hand(model, run.batches(1, 1))


def test_training_held_out_and_final_data_differ() -> None:
    run = RecallRun(model=TINY, pairs=4, batch_size=4)
    held_out, final = run.batches(1, 1)[0][0], run.batches(2, 1)[0][0]
    assert not torch.equal(held_out, final)
    assert not torch.equal(held_out, replace(run, seed=1).batches(1, 1)[0][0])


@pytest.mark.thorough
def test_recall_with_self_mod_loses_loss_and_repeats_bit_for_bit() -> None:
    model = HopeConfig(vocab_size=16, dim=16, num_layers=1, num_heads=2, chunk_size=4)
    run = RecallRun(model=model, steps=30, pairs=4, batch_size=8, eval_every=30, eval_batches=1)
    first, second = run.run(lambda steps: None), run.run(lambda steps: None)
    assert sum(first["losses"][-5:]) < sum(first["losses"][:5]) - 1.0
    assert first["losses"] == second["losses"] and first["nonfinite"] == 0


def test_text_result_is_the_loss_on_the_whole_validation_part(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{n} times {n} is {n * n}.\n" for n in range(400)))
    data = DataConfig(
        files=(str(text),),
        tokenizer=TokenizerConfig(kind="byte", vocab_size=257),
        cache_dir=str(tmp_path / "cache"),
    )
    model = replace(TINY, vocab_size=257)
    run = TextRun(model=model, optim=OptimConfig(lr=1e-9), data=data, seq_len=8, batch_size=2, steps=1)
    result = run.run(lambda steps: None)

    corpus = prepare_corpus([text], TokenizerConfig(kind="byte", vocab_size=257), tmp_path / "cache", 0.05)
    torch.manual_seed(0)
    logits = HopeLM(model)  # one step at this rate changes nothing that float32 can see in a loss
    losses = []
    for start in range(0, len(corpus.valid) // 9 // 2 * 2 * 9, 9):
        window = torch.tensor(corpus.valid[start : start + 9].astype(int))[None]
        log_p = logits(window[:, :-1])[0].log_softmax(-1)
        losses += [-log_p[0, t, window[0, t + 1]].item() for t in range(8)]
    assert result["final"] == pytest.approx(math.fsum(losses) / len(losses), abs=1e-5)
    assert result["unigram_entropy"] == corpus.unigram_entropy


def test_pilot_run_is_pilot_smoke() -> None:
    run = pilot_run(steps=10, seed=3)
    assert (run.model.dim, run.model.num_layers, run.model.num_heads) == (128, 3, 4)
    assert (run.model.vocab_size, run.model.mixer) == (1024, "self_mod")
    assert (run.seq_len * run.batch_size, run.steps, run.seed) == (2048, 10, 3)
