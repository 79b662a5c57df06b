"""What levels do: known dead and known living levels, and frozen ones beside models built without writes."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import tiny_config

from nested_learning.layers.cms import FastLevel
from nested_learning.levels import LevelSpec
from nested_learning.models.config import HopeConfig
from nested_learning.models.lm import HopeLM
from nested_learning.runtime import set_seed
from nested_learning.train.config import RunConfig, TrainConfig, run_config
from nested_learning.train.level_report import LevelEffect, LevelWatch, never_written, why_no_report
from nested_learning.train.objective import next_token_loss
from nested_learning.train.strategy import OneProcess
from nested_learning.train.trainer import Trainer

LENGTH = 24
LEVELS = (
    LevelSpec(name="fast", chunk_size=4, eta=0.5, gain=1.0),
    LevelSpec(name="dead", chunk_size=8, eta=1e-9, retention=False),  # retention alone would move it
    LevelSpec(),
    LevelSpec(name="slow", chunk_size=4 * LENGTH),
)


def config(levels: tuple[LevelSpec, ...] = LEVELS, **more: Any) -> HopeConfig:
    sizes = {"vocab_size": 257, "dim": 8, "num_layers": 2, "num_heads": 2, "chunk_size": 4}
    return HopeConfig(**sizes, seq_len=LENGTH, mixer="linear", levels=levels, **more)


def made(model: HopeConfig) -> tuple[HopeLM, torch.Tensor]:
    torch.manual_seed(0)
    tokens = torch.randint(model.vocab_size, (3, LENGTH + 1), generator=torch.Generator().manual_seed(1))
    return HopeLM(model), tokens


def loss_of(model: HopeLM, tokens: torch.Tensor) -> float:
    with torch.no_grad():
        return float(next_token_loss(model(tokens[:, :-1])[0], tokens[:, 1:]))


def effects_of(watch: LevelWatch, tokens: torch.Tensor) -> dict[str, LevelEffect]:
    found = watch.measure(tokens[:, :-1], lambda: loss_of(watch.model, tokens))
    assert [effect.level for effect in found] == [level.name for level in watch.model.config.levels]
    return {effect.level: effect for effect in found}


@pytest.mark.parametrize("variant", ["sequential", "nested", "independent"])
def test_a_frozen_fast_level_is_one_that_a_model_never_writes(variant: str) -> None:
    model, tokens = made(config(cms_variant=variant))
    still = replace(LEVELS[0], chunk_size=10**6)  # a period that is never reached; without seq_len it is fast
    other = HopeLM(replace(config(), levels=(still, *LEVELS[1:3]), cms_variant="sequential", seq_len=None))
    if variant != "sequential":  # resets and shares as in the model: only the one level differs
        other = HopeLM(config(cms_variant=variant))
        for block in other.blocks:
            level = block.memory.levels[0]  # type: ignore[union-attr]
            level.chunk_size = level.reset_every = 10**6
        other.load_state_dict(model.state_dict())
    else:
        model, tokens = made(replace(config(LEVELS[:3]), seq_len=None))
        other.load_state_dict(model.state_dict())
    before = loss_of(model, tokens)
    with never_written(model, "fast"):
        assert loss_of(model, tokens) == pytest.approx(loss_of(other, tokens), abs=1e-6)
    assert loss_of(model, tokens) == before
    assert abs(before - loss_of(other, tokens)) > 1e-5  # or the comparison says nothing


def test_the_change_of_a_fast_level_is_that_of_its_weights() -> None:
    model, tokens = made(config())
    effect = effects_of(LevelWatch(model), tokens)["fast"]
    moved = start = 0.0
    after = model(tokens[:, :-1])[1]
    for block, layer in zip(model.blocks, after.layers, strict=True):
        level, memory = block.memory.levels[0], layer.memory.levels[0].memory  # type: ignore[union-attr]
        pairs = ((memory.w2, level.initial.initial_w2), (memory.w1[0], level.initial.initial_w1))
        for now, first in pairs:
            for row in now:
                moved += ((row[0].squeeze() - first[0]) ** 2).sum().item()
                start += (first[0] ** 2).sum().item()
    assert effect.change == pytest.approx((moved / start) ** 0.5, rel=1e-5)
    assert effect.change > 1e-3


def test_dead_levels_are_named_and_living_ones_are_not() -> None:
    model, tokens = made(config())
    watch = LevelWatch(model)
    optimizer = torch.optim.Adam(
        [p for n, p in model.named_parameters() if n not in model.slow_parameters()["slow"]], lr=0.05
    )
    next_token_loss(model(tokens[:, :-1])[0], tokens[:, 1:]).backward()
    optimizer.step()  # a period of the slow level is never reached
    found = effects_of(watch, tokens)
    assert [name for name, effect in found.items() if effect.idle] == ["dead", "slow"]
    assert found["dead"].describe().startswith("level dead does nothing: it changes by ")
    assert found["slow"].describe().startswith("level slow does nothing: it changes by 0.0e+00")
    assert found["mlp"].describe().startswith("level mlp (plain): change ")
    kinds = [effect.kind for effect in found.values()]
    assert kinds == ["fast", "fast", "plain", "slow"]


def test_a_level_that_moves_without_effect_does_nothing() -> None:
    effect = LevelEffect("mlp", "plain", 0.1, 2.0, 2.000001)
    assert effect.describe() == (
        "level mlp does nothing: without its changes the loss is +1.0e-06 nats per token"
    )
    assert replace(effect, frozen=2.1).idle is None
    assert replace(effect, frozen=1.9).idle is None  # it does something, if nothing good


def test_a_slow_level_is_frozen_at_its_start() -> None:
    model, tokens = made(config())
    first = loss_of(model, tokens)
    watch = LevelWatch(model)
    names = model.slow_parameters()["slow"]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name in names:
                p.mul_(1.25)
    effect = effects_of(watch, tokens)["slow"]
    assert effect.change == pytest.approx(0.25, rel=1e-5)
    assert effect.frozen == first and effect.loss == loss_of(model, tokens) != first
    for name, p in model.named_parameters():  # all is as it was
        assert torch.equal(p, before[name] * (1.25 if name in names else 1))


def test_a_nested_level_that_ends_with_a_reset_has_a_change() -> None:
    levels = (LevelSpec(name="quick", chunk_size=4), LevelSpec(name="fast", chunk_size=8), LevelSpec())
    model, tokens = made(config(levels, cms_variant="nested"))
    found = effects_of(LevelWatch(model), tokens)  # 24 tokens: the last thing that `quick` does is a reset
    assert found["quick"].change > 1e-4 and found["fast"].change > 1e-4


def trainer(folder: Any, corpus: Any, name: str = "run", resume: Any = None, **train: Any) -> Trainer:
    values = tiny_config(folder, name, steps=8, seq_len=LENGTH, **train).to_dict()
    values["model"] = config().to_dict()
    made_config = run_config(values)
    made_config.run_dir.mkdir(parents=True, exist_ok=True)
    set_seed(made_config.seed)
    return Trainer(made_config, HopeLM(made_config.model), corpus, OneProcess(), resume)


def rows_of(run: Trainer) -> list[dict[str, float]]:
    lines = (run.config.run_dir / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if "valid_loss" in row]


def test_the_log_says_what_levels_do_and_training_is_the_same(tmp_path, corpus) -> None:
    with_report = trainer(tmp_path, corpus, "with")
    with_report.fit()
    rows, said = rows_of(with_report), {e.level: e.describe() for e in with_report._level_effects()}
    assert [row["step"] for row in rows] == [4, 8]
    assert rows[0]["level/fast/change"] > 1e-4 and rows[0]["level/dead/change"] < 1e-6
    assert rows[0]["level/slow/change"] > 0 and rows[1]["level/mlp/change"] > rows[0]["level/mlp/change"]
    assert said["dead"].startswith("level dead does nothing") and "(slow): change" in said["slow"]
    without = trainer(tmp_path, corpus, "without", level_report=0)
    without.fit()
    assert not any(key.startswith("level/") for row in rows_of(without) for key in row)
    for a, b in zip(with_report.model.parameters(), without.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_resumed_run_reports_as_the_whole_one(tmp_path, corpus) -> None:
    whole = trainer(tmp_path, corpus, "whole")
    whole.fit()
    part = trainer(tmp_path, corpus, "part")
    for _ in range(5):
        part.update(next(part.loader))
    part.save()
    resumed = trainer(tmp_path, corpus, "part", resume=part.store.latest())
    resumed.fit()
    assert rows_of(resumed)[-1] == rows_of(whole)[-1]


def test_where_there_is_no_report() -> None:
    run = RunConfig(model=config(), train=TrainConfig(seq_len=LENGTH))
    model, one = HopeLM(run.model), OneProcess()
    assert why_no_report(run, model, one) is None
    sharded: Any = SimpleNamespace(shards_parameters=True, name="fsdp")
    assert "fsdp keeps only parts" in (why_no_report(run, model, sharded) or "")
    plain = replace(run, model=config((LevelSpec(),)))
    assert why_no_report(plain, model, one) == ""
    off = replace(run, train=TrainConfig(seq_len=LENGTH, level_report=0))
    assert why_no_report(off, model, one) == ""


def test_nothing_of_a_frozen_level_stays_behind() -> None:
    model, _ = made(config(cms_variant="nested"))
    levels = [m for m in model.modules() if isinstance(m, FastLevel)]
    before = [(level.reset_every, level.compiled) for level in levels]
    with pytest.raises(KeyError), never_written(model, "fast"):
        raise KeyError
    assert [(level.reset_every, level.compiled) for level in levels] == before
