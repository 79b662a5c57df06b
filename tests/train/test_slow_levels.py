"""A slow level of a real model in a real run: it moves at its steps only, also across a kill."""

import copy

import pytest
import torch
from tiny import tiny_config

from nested_learning.config import load_config
from nested_learning.models.lm import HopeLM
from nested_learning.optim import MultiFrequencyOptimizer
from nested_learning.runtime import set_seed
from nested_learning.train.config import run_config
from nested_learning.train.launch import checkpoint_blocks
from nested_learning.train.strategy import OneProcess
from nested_learning.train.trainer import Trainer, slow_levels

LEVELS = [{"name": "fast", "chunk_size": 4}, {"name": "mlp"}, {"name": "slow", "chunk_size": 36}]


def make(folder, corpus, name, resume=None, checkpointing=False):
    """Sequences of 12 tokens: the level with a period of 36 moves at every third step."""
    values = tiny_config(folder, name, steps=10).to_dict()
    values["model"] |= {"vocab_size": 257, "dim": 8, "num_layers": 2, "num_heads": 2, "chunk_size": 4}
    values["model"] |= {"seq_len": 12, "levels": LEVELS, "mixer": "linear"}
    config = run_config(values)
    config.run_dir.mkdir(parents=True, exist_ok=True)
    set_seed(config.seed)
    model = HopeLM(config.model)
    if checkpointing:
        checkpoint_blocks(model)
    return Trainer(config, model, corpus, OneProcess(), resume)


def slow_part(model):
    names = model.slow_parameters()["slow"]
    return {name: p.detach().clone() for name, p in model.named_parameters() if name in names}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_slow_level_changes_exactly_at_its_steps(tmp_path, corpus, checkpointing):
    trainer = make(tmp_path, corpus, "run", checkpointing=checkpointing)
    assert len(slow_part(trainer.model)) == 2 * 3  # two blocks: a norm and two matrices
    for step in range(1, 8):
        before, others = slow_part(trainer.model), copy.deepcopy(dict(trainer.model.named_parameters()))
        trainer.update(next(trainer.loader))
        after = slow_part(trainer.model)
        moved = [not torch.equal(before[name], after[name]) for name in before]
        assert all(moved) if step % 3 == 0 else not any(moved)
        rest = {n: p for n, p in trainer.model.named_parameters() if n not in before}
        assert all(not torch.equal(others[n], p) for n, p in rest.items())
    assert trainer.optimizer.statistics() == {"slow": {"period": 3, "updates": 2, "last_update": 6}}


def test_a_run_killed_in_the_middle_of_a_window_ends_bit_for_bit_the_same(tmp_path, corpus):
    whole = make(tmp_path, corpus, "whole")
    whole.fit()
    part = make(tmp_path, corpus, "part")
    for _ in range(5):
        part.update(next(part.loader))
    part.save()
    part.update(next(part.loader))  # lost with the process
    resumed = make(tmp_path, corpus, "part", resume=part.store.latest())
    assert resumed.optimizer.statistics()["slow"] == {"period": 3, "updates": 1, "last_update": 3}
    gathered = [state for state in resumed.optimizer.state.values() if state.get("gathered")]
    assert len(gathered) == 6 and all(state["accumulated"].any() for state in gathered)
    resumed.fit()
    for (name, a), b in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_without_slow_levels_the_optimizer_is_not_wrapped(make_trainer):
    assert not isinstance(make_trainer().optimizer, MultiFrequencyOptimizer)


def test_the_shipped_configuration_has_a_slow_level_of_sixteen_steps():
    config = load_config("pilot_smoke", ["experiment=cms_slow"])
    with torch.device("meta"):
        model = HopeLM(config.model)
    found = slow_levels(config.model, model)
    assert {name: steps for name, (steps, _) in found.items()} == {"slow": 16}
    assert len(found["slow"][1]) == 3 * config.model.num_layers
