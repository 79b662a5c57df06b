"""Fields that a person changes on purpose when a run goes on: `train.resume_with`."""

import re

import pytest
import torch
from test_launch import losses, overrides
from tiny import TinyModel, tiny_config

from nested_learning.checks import field_names
from nested_learning.config import load_config
from nested_learning.optim.options import OPTIONS, read_options
from nested_learning.runtime import set_seed
from nested_learning.train.checkpoint import CheckpointError, read_checkpoint
from nested_learning.train.config import RunConfig, run_config
from nested_learning.train.launch import launch
from nested_learning.train.resume_with import FIXED, check_resume_with
from nested_learning.train.strategy import OneProcess
from nested_learning.train.trainer import Trainer

RULES = {
    "adamw": {"betas": [0.5, 0.6], "eps": 1e-3, "weight_decay": 0.7},
    "sgd": {"momentum": 0.1, "weight_decay": 0.7},
    "muon": {"muon": {"momentum": 0.5}, "adamw_lr_scale": 0.1},
    "m3": {"m3": {"betas": [0.5, 0.5, 0.5]}, "weight_decay": 0.7},
    "delta_momentum": {"delta_momentum": {"momentum": 0.2}},
    "deep_momentum": {"deep_momentum": {"decay": 0.2}},
    "dgd": {"dgd": {"target": "relative"}},
}


def trainer_of(folder, corpus, optim, resume=None, **train):
    """A trainer of `TinyModel` in `folder`; with `resume`, one that goes on and may change all of these."""
    base = tiny_config(folder, "run", steps=8, save_every=4, eval_every=8, **train).to_dict()
    config = run_config({**base, "optim": {**base["optim"], **optim}})
    config.run_dir.mkdir(parents=True, exist_ok=True)
    set_seed(config.seed)
    return Trainer(config, TinyModel(), corpus, OneProcess(), resume)


def flat(values, name="optim"):
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flat(value, f"{name}.{key}")
        else:
            yield f"{name}.{key}"


@pytest.mark.parametrize("rule", RULES)
def test_the_next_steps_are_those_of_an_optimizer_changed_by_hand(tmp_path, corpus, rule):
    old = {"name": rule, "lr": 1e-2}
    changed = {**RULES[rule], "lr": 3e-2}
    first = trainer_of(tmp_path, corpus, old)
    while first.step < 4:
        first.update(next(first.loader))
    first.save()

    named = list(flat(changed))
    second = trainer_of(tmp_path, corpus, {**old, **changed}, first.store.latest(), resume_with=named)
    by_hand = trainer_of(tmp_path, corpus, {**old, **changed})  # fresh: only its options are of use
    for group, options in zip(first.optimizer.param_groups, read_options(by_hand.optimizer), strict=True):
        group.update(options)
    first.config.optim.lr = 3e-2  # of the schedule
    for trainer in (first, second):
        while trainer.step < 8:
            trainer.update(next(trainer.loader))
    for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)
    rates = [group["lr"] for group in second.optimizer.param_groups]
    assert rates == [group["lr"] for group in first.optimizer.param_groups]


def test_a_changed_option_changes_the_weights(tmp_path, corpus):
    """What the test above compares would be equal too if neither had the new values."""
    ends = []
    for number, options in enumerate([{}, {"weight_decay": 0.7}, {"betas": [0.5, 0.6]}, {"lr": 2e-2}]):
        folder = tmp_path / str(number)
        first = trainer_of(folder, corpus, {"lr": 1e-2})
        first.update(next(first.loader))
        first.save()
        resumed = trainer_of(
            folder, corpus, {"lr": 1e-2, **options}, first.store.latest(), resume_with=list(flat(options))
        )
        for _ in range(2):
            resumed.update(next(resumed.loader))
        ends.append(resumed.model.head.weight.detach())
    assert not any(torch.equal(a, b) for i, a in enumerate(ends) for b in ends[:i])


def test_every_option_of_a_fresh_group_is_known(tmp_path, corpus):
    """A new option must be listed in `OPTIONS`, or here as one that the configuration does not decide."""
    of_torch = {
        "amsgrad",
        "foreach",
        "maximize",
        "capturable",
        "differentiable",
        "fused",
        "dampening",
        "nesterov",
    }
    others = {
        "params",
        "param_names",
        "name",
        "lr",
        "decoupled_weight_decay",
        "ns_coefficients",
        "adjust_lr_fn",
    }
    for rule in RULES:
        for group in trainer_of(tmp_path / rule, corpus, {"name": rule}).optimizer.param_groups:
            assert group.keys() <= OPTIONS | of_torch | others


def test_what_is_not_named_is_refused_and_the_way_is_said(tmp_path, corpus):
    first = trainer_of(tmp_path, corpus, {"lr": 1e-2})
    first.update(next(first.loader))
    first.save()
    latest = first.store.latest()
    with pytest.raises(CheckpointError) as refused:
        trainer_of(tmp_path, corpus, {"lr": 2e-2, "eps": 1e-6}, latest)
    assert (
        "optim.lr is 0.02, was 0.01; optim.eps is 1e-06, was 1e-08; "
        "train.resume_with=[optim.lr,optim.eps] goes on with new values, train.resume=null"
        in str(refused.value)
    )
    with pytest.raises(CheckpointError, match=r"optim.eps is 1e-06.*resume_with=\[optim.eps\]") as refused:
        trainer_of(tmp_path, corpus, {"lr": 2e-2, "eps": 1e-6}, latest, resume_with=["optim.lr"])
    assert "optim.lr" not in str(refused.value)
    with pytest.raises(CheckpointError, match="optim.name is 'sgd'") as refused:
        trainer_of(tmp_path, corpus, {"lr": 2e-2, "name": "sgd"}, latest)
    assert "resume_with" not in str(refused.value)


@pytest.mark.parametrize(
    "name, said",
    [
        ("optim.lrr", "unknown key 'optim.lrr'; did you mean optim.lr?"),
        ("train.step", "unknown key 'train.step'; did you mean train.steps?"),
        ("model.dim", "must not hold model.dim: the weights are of that model$"),
        (
            "data.tokenizer.vocab_size",
            "must not hold data.tokenizer.vocab_size: the weights are of its tokens$",
        ),
        ("data.files", "must not hold data.files: the place in the data depends on it; train.init_from="),
        ("optim.name", "must not hold optim.name: the optimizer's state depends on it; train.init_from="),
        ("optim", "must not hold optim: optim.name is in it, and the optimizer's state"),
    ],
)
def test_names_that_cannot_be_changed_are_refused(tmp_path, name, said):
    with pytest.raises(ValueError, match=f"^train.resume_with:? {said.replace('?', re.escape('?'))}"):
        tiny_config(tmp_path, "run", resume_with=["train.steps", name])


def test_names_that_can_be_changed():
    check_resume_with(["optim.lr", "optim.muon", "train.steps", "train.init_from", "adapt.lr"], RunConfig)


def test_every_fixed_name_is_a_field():
    assert FIXED.keys() <= set(field_names(RunConfig))


def test_a_run_of_train_py_goes_on_at_another_rate_for_longer(tmp_path):
    more = {"train.steps": 4, "optim.schedule": "constant", "optim.warmup_steps": 0, "name": "run"}
    launch(load_config("pilot_smoke", overrides(tmp_path, **more)))
    changed = {**more, "optim.lr": 1e-5, "train.steps": 6}
    with pytest.raises(
        CheckpointError, match=r"optim.lr is 1e-05, was 0.003; train.resume_with=\[optim.lr\]"
    ):
        launch(load_config("pilot_smoke", overrides(tmp_path, **changed)))
    changed["train.resume_with"] = "[optim.lr,train.steps]"
    config = load_config("pilot_smoke", overrides(tmp_path, **changed))
    assert launch(config).step == 6
    assert list(losses(config.run_dir)) == [1, 2, 3, 4, 5, 6]
    rates = {group["lr"] for group in read_checkpoint(config.run_dir)["optimizer"]["groups"]}
    assert rates == {1e-5}
    del changed["train.resume_with"]  # the run has the new rate now
    assert (
        launch(load_config("pilot_smoke", overrides(tmp_path, **changed, **{"train.save_every": 1}))).step
        == 6
    )
