"""Against a loop that keeps the gradients of every level in lists, with an optimizer for each level."""

import copy
import io

import pytest
import torch
from tolerances import assert_same
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from nested_learning.optim import LearnedRates, MultiFrequencyOptimizer, build_optimizer
from nested_learning.optim.combined import Combined
from nested_learning.optim.config import OptimConfig

SIZES = {"medium": 3, "slow": 5}
MAKERS = {
    "sgd": lambda p, lr=0.1: torch.optim.SGD(p, lr=lr, momentum=0.9, weight_decay=0.1),
    "adamw": lambda p, lr=0.1: torch.optim.AdamW(p, lr=lr, weight_decay=0.1),
    "adamw_fused": lambda p, lr=0.1: torch.optim.AdamW(p, lr=lr, weight_decay=0.1, fused=True),
    "adamw_foreach": lambda p, lr=0.1: torch.optim.AdamW(p, lr=lr, weight_decay=0.1, foreach=True),
    "muon": lambda p, lr=0.1: torch.optim.Muon(p, lr=lr, weight_decay=0.1),
}


def net():
    torch.manual_seed(0)
    names = ("fast", "medium", "slow")
    return nn.ModuleDict({name: nn.Linear(4, 4, bias=False) for name in names}).double()


def batch(step):
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


def loss_of(model, step):
    x = batch(step)
    for module in model.values():
        x = x + torch.tanh(module(x))
    return x.square().mean()


def wrap(model, maker, **options):
    levels = {name: list(model[name].parameters()) for name in SIZES}
    return MultiFrequencyOptimizer(MAKERS[maker](list(model.parameters())), SIZES, levels, **options)


def train(model, optimizer, first, last):
    for step in range(first, last + 1):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()


def naive(model, maker, steps, scale_lr=True, average=False):
    """Gradients in lists, an optimizer for each level, made with that level's rate."""
    sizes = {"fast": 1, **SIZES}
    optimizers = {
        name: MAKERS[maker](model[name].parameters(), 0.1 / (size if scale_lr else 1))
        for name, size in sizes.items()
    }
    gathered = {name: [] for name in sizes}
    for step in range(1, steps + 1):
        gradients = torch.autograd.grad(loss_of(model, step), [m.weight for m in model.values()])
        for name, gradient in zip(sizes, gradients, strict=True):
            gathered[name].append(gradient)
        for name, size in sizes.items():
            if step % size == 0:
                total = sum(gathered[name]) / (size if average else 1)
                model[name].weight.grad = total
                optimizers[name].step()
                gathered[name] = []


LENGTH = 20 * 3 * 4  # operations in a row: steps, layers, width


def same(a, b, length):
    """`length` 0: bit for bit, where both run the same kernels on the same numbers."""
    assert_same(dict(a.named_parameters()), dict(b.named_parameters()), length)


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("options", [{}, {"scale_lr": False}, {"average": True}])
def test_equals_the_naive_loop_over_twenty_steps(maker, options):
    model, reference = net(), net()
    train(model, wrap(model, maker, **options), 1, 20)
    naive(reference, maker, 20, **options)
    same(model, reference, LENGTH)


@pytest.mark.parametrize("maker", MAKERS)
def test_with_all_periods_one_it_is_the_plain_optimizer(maker):
    model, reference = net(), net()
    plain = MAKERS[maker](list(reference.parameters()))
    levels = {name: [model[name].weight] for name in model}
    wrapped = MultiFrequencyOptimizer(
        MAKERS[maker](list(model.parameters())), dict.fromkeys(model, 1), levels
    )
    train(model, wrapped, 1, 8)
    train(reference, plain, 1, 8)
    same(model, reference, length=0)


def moments_of(optimizer, parameter):
    """The inner optimizer's state of a parameter."""
    return {k: v for k, v in optimizer.state[parameter].items() if k not in optimizer.keys}


@pytest.mark.parametrize("maker", ["sgd", "adamw"])
def test_a_level_and_its_moments_stay_untouched_between_its_updates(maker):
    model = net()
    optimizer = wrap(model, maker)
    changed = {name: [] for name in model}
    for step in range(1, 13):
        before = copy.deepcopy(model.state_dict())
        moments = copy.deepcopy({n: moments_of(optimizer, model[n].weight) for n in model})
        train(model, optimizer, step, step)
        for name in model:
            moved = not torch.equal(model[name].weight, before[f"{name}.weight"])
            after = moments_of(optimizer, model[name].weight)
            same_moments = all(torch.equal(after[key], value) for key, value in moments[name].items())
            assert after and (step == 1 or moved != same_moments)
            if moved:
                changed[name].append(step)
    assert changed == {"fast": list(range(1, 13)), "medium": [3, 6, 9, 12], "slow": [5, 10]}
    assert optimizer.statistics() == {
        "medium": {"period": 3, "updates": 4, "last_update": 12},
        "slow": {"period": 5, "updates": 2, "last_update": 10},
    }


def test_grad_is_that_of_the_step_and_the_learning_rate_that_of_the_schedule():
    model = net()
    optimizer = wrap(model, "sgd")
    for step in range(1, 7):
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * step
        optimizer.zero_grad()
        loss_of(model, step).backward()
        own = [p.grad.clone() for p in model.parameters()]
        optimizer.step()
        assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), own, strict=True))
        assert {group["lr"] for group in optimizer.param_groups} == {0.01 * step}


def test_clipping_before_the_step_limits_the_contribution_of_each_step():
    """SGD on a sum of clipped gradients, at lr / 2: by hand."""
    p = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = MultiFrequencyOptimizer(torch.optim.SGD([p], lr=0.5), {"slow": 2}, {"slow": [p]})
    for gradient in (10.0, 0.5):
        p.grad = torch.full_like(p, gradient)
        torch.nn.utils.clip_grad_norm_([p], 1.0)
        optimizer.step()
    assert p.item() == pytest.approx(-0.25 * (1.0 + 0.5), rel=1e-5)


def test_a_step_without_gradient_adds_nothing_and_a_window_without_any_changes_nothing():
    p = nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = MultiFrequencyOptimizer(
        torch.optim.AdamW([p], lr=0.5, weight_decay=0.5), {"slow": 2}, {"slow": [p]}
    )
    for _ in range(2):
        optimizer.step()
    assert p.item() == 1 and not optimizer.state[p]
    p.grad = torch.ones_like(p)
    optimizer.step()
    p.grad = None
    optimizer.step()
    assert p.item() == pytest.approx(1 - 0.25 * 0.5 - 0.25)  # decay, then Adam's first step, at lr / 2


def test_gradients_are_gathered_in_float32_for_bfloat16_parameters():
    p = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    optimizer = MultiFrequencyOptimizer(
        torch.optim.SGD([p], lr=1.0), {"slow": 512}, {"slow": [p]}, scale_lr=False
    )
    for _ in range(512):
        p.grad = torch.ones_like(p)
        optimizer.step()
    assert p.item() == -512  # a sum in bfloat16 would be stuck at 256


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("stop", [4, 6, 9, 10])
def test_state_goes_round_bit_for_bit_in_the_middle_of_a_window(maker, stop):
    whole, part, rest = net(), net(), net()
    train(whole, wrap(whole, maker), 1, 17)
    optimizer = wrap(part, maker)
    train(part, optimizer, 1, stop)
    file = io.BytesIO()
    torch.save([part.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    rest.load_state_dict(weights)
    resumed = wrap(rest, maker)
    resumed.load_state_dict(state)
    assert resumed.statistics() == optimizer.statistics()
    train(rest, resumed, stop + 1, 17)
    same(rest, whole, length=0)


def test_state_goes_round_through_distributed_checkpoints():
    """By parameter names, as FSDP2 saves an optimizer."""
    whole, part, rest = net(), net(), net()
    train(whole, wrap(whole, "adamw"), 1, 11)
    optimizer = wrap(part, "adamw")
    train(part, optimizer, 1, 7)
    saved = copy.deepcopy(get_optimizer_state_dict(part, optimizer))
    assert "accumulated" in saved["state"]["medium.weight"]
    rest.load_state_dict(part.state_dict())
    resumed = wrap(rest, "adamw")
    set_optimizer_state_dict(rest, resumed, saved)
    train(rest, resumed, 8, 11)
    same(rest, whole, length=0)


def test_wraps_learned_rates_and_both_are_saved():
    def make(model):
        levels = {name: [model[name].weight] for name in SIZES}
        inner = LearnedRates(MAKERS["adamw"](list(model.parameters())), levels, beta=0.1)
        return MultiFrequencyOptimizer(inner, SIZES, levels), inner

    whole, part, rest = net(), net(), net()
    train(whole, make(whole)[0], 1, 17)
    optimizer, _ = make(part)
    train(part, optimizer, 1, 7)
    state = copy.deepcopy(optimizer.state_dict())
    rest.load_state_dict(part.state_dict())
    resumed, rates = make(rest)
    resumed.load_state_dict(state)
    train(rest, resumed, 8, 17)
    same(rest, whole, length=0)
    assert all(rate != 1 for rate in rates.rates.values())


def test_a_torch_scheduler_and_a_closure_work():
    model, reference = net(), net()
    optimizer = wrap(model, "sgd")
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    for step in range(1, 5):

        def closure(step=step):
            optimizer.zero_grad()
            loss = loss_of(model, step)
            loss.backward()
            return loss

        assert optimizer.step(closure).requires_grad
        schedule.step()
    other = wrap(reference, "sgd")
    for step in range(1, 5):
        for group in other.param_groups:
            group["lr"] = 0.1 * 0.5 ** (step - 1)
        train(reference, other, step, step)
    same(model, reference, LENGTH)


def test_groups_are_split_by_level_and_keep_their_settings():
    model = net()
    groups = [{"params": list(model.parameters()), "lr": 0.3, "name": "matrix"}]
    optimizer = MultiFrequencyOptimizer(
        torch.optim.SGD(groups, lr=0.1), SIZES, {name: [model[name].weight] for name in SIZES}
    )
    assert [(g.get("level"), g["lr"], g["name"]) for g in optimizer.param_groups] == [
        (None, 0.3, "matrix"),
        ("medium", 0.3, "matrix"),
        ("slow", 0.3, "matrix"),
    ]
    assert optimizer.optimizer.param_groups is optimizer.param_groups


def test_an_update_that_is_not_finite_is_skipped_by_a_fused_optimizer():
    model = net()
    optimizer = wrap(model, "adamw_fused")
    assert optimizer._step_supports_amp_scaling
    before = copy.deepcopy(model.state_dict())
    optimizer.found_inf = torch.ones(())
    train(model, optimizer, 1, 3)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not wrap(net(), "sgd")._step_supports_amp_scaling


@pytest.mark.parametrize(
    "sizes, levels, message",
    [
        ({"slow": 2}, {"medium": []}, r"must have the same names, got \['slow'\] and \['medium'\]"),
        ({"slow": 0}, {"slow": []}, r"periods\['slow'\] must be an integer of at least 1, got 0"),
        (
            {"slow": 2},
            {"slow": [nn.Parameter(torch.ones(1))]},
            "a parameter of level 'slow' is not one of the optimizer",
        ),
        ({"a": 2, "b": 3}, {"a": ["slow"], "b": ["slow"]}, "levels 'a' and 'b' must not share a parameter"),
    ],
)
def test_errors(sizes, levels, message):
    model = net()
    levels = {
        name: [model[p].weight if isinstance(p, str) else p for p in found] for name, found in levels.items()
    }
    with pytest.raises(ValueError, match=message):
        MultiFrequencyOptimizer(MAKERS["sgd"](list(model.parameters())), sizes, levels)


def test_loading_the_state_of_other_levels_is_refused():
    model = net()
    state = wrap(model, "sgd").state_dict()
    other = MultiFrequencyOptimizer(
        MAKERS["sgd"](list(model.parameters())),
        {"medium": 3, "slow": 4},
        {name: [model[name].weight] for name in SIZES},
    )
    with pytest.raises(ValueError, match=r"must be .*\('slow', 4\)\], the saved ones are .*\('slow', 5\)\]"):
        other.load_state_dict(state)


@pytest.mark.parametrize("name", ["adamw", "sgd", "muon", "m3", "delta_momentum", "deep_momentum"])
def test_every_optimizer_of_the_configuration_leaves_a_slow_level_alone_until_it_is_due(name):
    model = nn.ModuleDict({key: nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)) for key in ("fast", "slow")})
    names = [parameter for parameter, _ in model.named_parameters() if parameter.startswith("slow")]
    optimizer = build_optimizer(OptimConfig(name=name, lr=1e-2), model, {"slow": (3, names)})
    changed = {key: [] for key in model}
    for step in range(1, 8):
        before = copy.deepcopy(model.state_dict())
        optimizer.zero_grad()
        x = torch.randn(6, 4, generator=torch.Generator().manual_seed(step))
        model["slow"](model["fast"](x)).square().sum().backward()
        optimizer.step()
        for key in model:
            if any(not torch.equal(before[n], v) for n, v in model.state_dict().items() if n.startswith(key)):
                changed[key].append(step)
    assert changed == {"fast": [1, 2, 3, 4, 5, 6, 7], "slow": [3, 6]}


def test_slow_levels_that_cannot_be_built():
    model = net()
    parts = Combined([torch.optim.SGD(list(model.parameters()), lr=0.1)])
    with pytest.raises(ValueError, match="use split_by_level on the groups of an optimizer before"):
        MultiFrequencyOptimizer(parts, {"slow": 2}, {"slow": [model["slow"].weight]})
    with pytest.raises(ValueError, match="the model has no parameter 'b'"):
        build_optimizer(OptimConfig(), nn.Linear(2, 2), {"slow": (3, ["weight", "b"])})
    with pytest.raises(ValueError, match=r"optim.name = dgd cannot update slow levels \(slow\)"):
        build_optimizer(OptimConfig(name="dgd"), nn.Linear(2, 2), {"slow": (3, ["weight"])})
