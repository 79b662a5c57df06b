"""From a configuration to optimizers made of parts: who takes which parameter, at which rate."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from tolerances import assert_same
from torch import nn
from torch.nn import functional as F

from nested_learning.config import load_config
from nested_learning.models.config import HopeConfig
from nested_learning.models.lm import HopeLM
from nested_learning.optim import M3, Combined, build_optimizer, group_names
from nested_learning.optim.build import MATRIX_OPTIMIZERS
from nested_learning.optim.config import OptimConfig

RULES = list(MATRIX_OPTIMIZERS)
CLASSES = {
    "muon": "Muon",
    "m3": "M3",
    "dgd": "DeltaGradientDescent",
    "delta_momentum": "DeltaMomentum",
    "deep_momentum": "DeepMomentum",
}


def language_model(**changes):
    torch.manual_seed(0)
    config = {"vocab_size": 32, "dim": 32, "num_layers": 1, "num_heads": 2, "chunk_size": 8, **changes}
    return HopeLM(HopeConfig(**config))


def train(model, optimizer, steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(steps):
        start = torch.randint(32, (8, 1), generator=generator)
        tokens = (start + torch.arange(25)) % 32  # counting
        optimizer.zero_grad()
        loss = F.cross_entropy(model(tokens[:, :-1])[0].flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("name", RULES)
def test_matrices_go_to_the_rule_and_the_rest_to_adamw_each_once(name, tie):
    model = language_model(tie_embeddings=tie)
    optimizer = build_optimizer(OptimConfig(name=name), model)
    assert isinstance(optimizer, Combined)
    names = {id(p): n for n, p in model.named_parameters()}
    claimed = [[names[id(p)] for g in part.param_groups for p in g["params"]] for part in optimizer.parts]
    assert sorted(claimed[0] + claimed[1]) == sorted(names.values())
    matrices = [n for n in group_names(model)["matrix"] if model.get_parameter(n).ndim == 2]
    assert sorted(claimed[0]) == sorted(matrices) and len(matrices) > 3
    assert (
        type(optimizer.parts[0]).__name__.lower().startswith(name.replace("_", "").replace("dgd", "deltag"))
    )
    assert type(optimizer.parts[1]) is torch.optim.AdamW
    assert "embedding.weight" in claimed[1] and ("head.weight" in claimed[1]) is not tie
    kinds = {g["name"]: g["weight_decay"] for g in optimizer.param_groups}
    assert kinds["matrix"] == 0.1 and kinds["embedding"] == kinds["vector"] == kinds["memory"] == 0.0


@pytest.mark.thorough
@pytest.mark.parametrize("name", RULES)
def test_every_rule_trains_a_language_model(name):
    model = language_model()
    rates = {"deep_momentum": 0.02, "delta_momentum": 0.05, "dgd": 0.01}
    config = OptimConfig(name=name, lr=rates.get(name, 0.01), weight_decay=0.0)
    if name in rates:
        config.adamw_lr_scale = 0.01 / config.lr
    losses = train(model, build_optimizer(config, model), 80)
    assert losses[0] > 3.3 and losses[-1] < 0.6 * losses[0], (losses[0], losses[-1])


@pytest.mark.parametrize("name", RULES)
def test_combined_is_saved_loaded_and_copied_like_one_optimizer(name):
    config = OptimConfig(name=name, lr=0.01)
    model = language_model()
    optimizer = build_optimizer(config, model)
    train(model, optimizer, 3)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    other = copy.deepcopy(twin)
    for module in other.modules():  # a fresh model would carry no hooks of another optimizer
        module._forward_hooks.clear()
    other_optimizer = build_optimizer(OptimConfig(name=name, lr=0.5), other)
    file.seek(0)
    other_optimizer.load_state_dict(torch.load(file, weights_only=True))
    expected = train(model, optimizer, 3, seed=1)
    assert train(twin, twin_optimizer, 3, seed=1) == expected
    assert train(other, other_optimizer, 3, seed=1) == expected
    for a, b, c in zip(model.parameters(), twin.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


def test_combined_does_what_its_parts_do_alone():
    mine, theirs = language_model(), language_model()
    config = OptimConfig(name="muon", lr=0.01, adamw_lr_scale=0.5)
    optimizer = build_optimizer(config, mine)
    matrices = [theirs.get_parameter(n) for n in group_names(mine)["matrix"]]
    rest = [p for p in theirs.parameters() if all(p is not m for m in matrices)]
    muon = torch.optim.Muon(matrices, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(rest, lr=0.005, weight_decay=0.0, betas=config.betas, fused=True)
    pair = nn.Module()
    pair.zero_grad = theirs.zero_grad
    pair.step = lambda: (muon.step(), adamw.step())
    losses = [torch.tensor(train(mine, optimizer, 4)), torch.tensor(train(theirs, pair, 4))]
    assert_same(*losses, length=24 * 32, factor=1)


def test_a_schedule_that_writes_one_rate_keeps_the_ratio():
    p, q = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    sgd = [torch.optim.SGD([p], lr=1.0), torch.optim.SGD([{"params": [q], "lr_scale": 0.25}], lr=1.0)]
    optimizer = Combined(sgd)
    for group in optimizer.param_groups:
        group["lr"] = 2.0
    p.grad, q.grad = torch.ones(2), torch.ones(2)
    assert optimizer.step(lambda: 3) == 3
    assert p.tolist() == [-2.0, -2.0] and q.tolist() == [-0.5, -0.5]
    assert [group["lr"] for group in optimizer.param_groups] == [2.0, 2.0]


def test_combined_refuses_what_no_part_would_own():
    p, q = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match="at least one optimizer"):
        Combined([])
    with pytest.raises(ValueError, match="more than one parameter group"):
        Combined([torch.optim.SGD([p]), torch.optim.SGD([p])])
    with pytest.raises(ValueError, match="add a parameter group to a part before it is combined"):
        Combined([torch.optim.SGD([p])]).add_param_group({"params": [q]})


@pytest.mark.parametrize("name", RULES)
def test_files_choose_a_rule_and_its_options(name):
    config = load_config(
        "pilot_smoke", [f"optim={name}", "optim.m3.slow_every=7", "optim.m3.betas=[0.1,0.2,0.3]"]
    )
    assert config.optim.name == name
    model = HopeLM(config.model)
    optimizer = build_optimizer(config.optim, model)
    if name == "m3":
        assert isinstance(optimizer.parts[0], M3)
        assert optimizer.param_groups[0]["slow_every"] == 7
        assert optimizer.param_groups[0]["betas"] == (0.1, 0.2, 0.3)


def test_a_model_without_matrices_is_left_to_adamw():
    optimizer = build_optimizer(OptimConfig(name="m3"), nn.LayerNorm(3))
    assert [type(part) for part in optimizer.parts] == [torch.optim.AdamW]


def test_hooks_and_compilation_are_refused_together():
    with pytest.raises(ValueError, match=r"optim\.name = dgd watches inputs .* train\.compile = true hides"):
        load_config("pilot_smoke", ["optim=dgd", "train.compile=true"])
