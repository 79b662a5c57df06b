"""Levels: what kind each is, and when it is written."""

from __future__ import annotations

import re

import pytest

from nested_learning.config import load_config
from nested_learning.levels import LevelSpec, kind_of
from nested_learning.models.config import HopeConfig
from nested_learning.models.lm import HopeLM
from nested_learning.train.config import RunConfig, TrainConfig


def test_a_period_against_the_sequence_decides_the_kind_of_a_level() -> None:
    assert kind_of(LevelSpec(), 64) == "plain"
    assert kind_of(LevelSpec(chunk_size=32), 64) == "fast"
    assert kind_of(LevelSpec(chunk_size=128), 64) == "slow"
    assert kind_of(LevelSpec(chunk_size=128), None) == "fast"


def test_slow_parameters_are_names_of_the_model_in_every_block() -> None:
    levels = (
        LevelSpec(name="fast", chunk_size=4),
        LevelSpec(name="slow", chunk_size=32),
        LevelSpec(name="slower", chunk_size=64),
        LevelSpec(),
    )
    lm = HopeLM(HopeConfig(vocab_size=9, dim=8, num_layers=2, num_heads=2, levels=levels, seq_len=16))
    slow = lm.slow_parameters()
    own = ("norms.1.weight", "levels.1.w_in.weight", "levels.1.w_out.weight")
    assert slow["slow"] == [f"blocks.{i}.memory.{name}" for i in (0, 1) for name in own]
    assert list(slow) == ["slow", "slower"]
    names = {name for name, _ in lm.named_parameters()}
    assert set(slow["slow"]) | set(slow["slower"]) <= names
    assert not set(slow["slow"]) & set(slow["slower"])


def test_files_make_a_level_slow_that_is_longer_than_the_sequence() -> None:
    levels = "model.levels=[{name: a, chunk_size: 512}, {name: b}]"
    config = load_config("pilot_smoke", [levels])
    assert config.model.seq_len == config.train.seq_len == 256
    assert config.model.level_kind(config.model.levels[0]) == "slow"
    longer = load_config("pilot_smoke", [levels, "train.seq_len=1024"])
    assert longer.model.level_kind(longer.model.levels[0]) == "fast"


@pytest.mark.parametrize(
    "size, message",
    [
        (256, "model.levels.a.chunk_size must be less than train.seq_len = 256"),
        (300, "model.levels.a.chunk_size must be less than model.seq_len = 256 or a multiple of it, got 300"),
    ],
)
def test_periods_that_fit_no_clock(size: int, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        load_config("pilot_smoke", [f"model.levels=[{{name: a, chunk_size: {size}}}]"])


def test_model_and_training_must_agree_on_the_length() -> None:
    with pytest.raises(ValueError, match="model.seq_len must be train.seq_len = 64 or null, got 32"):
        RunConfig(model=HopeConfig(seq_len=32), train=TrainConfig(seq_len=64))
    level = LevelSpec(name="a", chunk_size=128)
    with pytest.raises(ValueError, match="model.seq_len = train.seq_len makes longer ones slow"):
        RunConfig(model=HopeConfig(levels=(level,)), train=TrainConfig(seq_len=64))
