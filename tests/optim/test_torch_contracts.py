"""What users of torch.optim expect of every optimizer, also of those around and made of others."""

import copy
import pickle

import pytest
import torch
from torch import nn

from nested_learning.optim import (
    M3,
    DeepMomentum,
    DeltaGradientDescent,
    DeltaMomentum,
    GeneralizedGradientDescent,
    LearnedRates,
    MultiFrequencyOptimizer,
    build_optimizer,
)
from nested_learning.optim.config import M3Config, OptimConfig

LR = 0.05


class Net(nn.Module):
    """Parameters of 0, 1, 2, 3 and 4 dimensions; with `is_laid_out`, none of the larger ones contiguous."""

    def __init__(self, is_laid_out=False, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 2)  # [8, 3, 2, 2]
        self.point = nn.Conv2d(8, 2, 1)
        self.rows = nn.Conv1d(8, 2, 2)
        self.linear = nn.Linear(2, 5)
        self.wide = nn.Linear(5, 3, bias=False)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.to(dtype)
        if is_laid_out:
            self.conv.to(memory_format=torch.channels_last)
            self.point.to(memory_format=torch.channels_last)
            for layer in (self.linear, self.wide):
                layer.weight = nn.Parameter(layer.weight.detach().mT.contiguous().mT)
            padded = torch.zeros(2, 8, 4, dtype=dtype)
            padded[..., ::2] = self.rows.weight.detach()
            self.rows.weight = nn.Parameter(padded[..., ::2])
            assert not any(p.is_contiguous() for p in self.parameters() if p.ndim > 1 and p.shape[-1] > 1)

    def forward(self, x):
        x = torch.tanh(self.conv(x))
        x = self.point(x).mean((2, 3)) + self.rows(x.mean(3)).mean(2)
        return self.scale * self.wide(torch.tanh(self.linear(x)))


def level(model):
    return {"slow": list(model.linear.parameters())}


def by_name(name):
    config = OptimConfig(name=name, lr=LR, m3=M3Config(ns_dtype="param"))
    return lambda model, lr=LR: build_optimizer(config, model)


M3_OPTIONS = {"slow_every": 2, "ns_dtype": "param"}
OWN = {
    "m3": lambda m, **o: M3(m.parameters(), **{"lr": LR, **M3_OPTIONS, **o}),
    "delta": lambda m, **o: DeltaMomentum(m.parameters(), **{"lr": LR, **o}),
    "delta_left": lambda m, **o: DeltaMomentum(m.parameters(), **{"lr": LR, "side": "left", **o}),
    "delta_adam": lambda m, **o: DeltaMomentum(
        m.parameters(), **{"lr": LR, "output": "newton_schulz", "precondition": "diagonal", **o}
    ),
    "deep": lambda m, **o: DeepMomentum(m.parameters(), **{"lr": LR, "output": "newton_schulz", **o}),
    "dgd": lambda m, **o: DeltaGradientDescent(m, **{"lr": LR, **o}),
    "ggd": lambda m, **o: GeneralizedGradientDescent(m, **{"lr": LR, **o}),
}
MADE = {
    "combined": by_name("m3"),
    "combined_dgd": by_name("dgd"),
    "adamw": by_name("adamw"),
    "sgd": by_name("sgd"),
    "rates": lambda m, lr=LR: LearnedRates(torch.optim.AdamW(m.parameters(), lr=lr), level(m), 0.1),
    "slow": lambda m, lr=LR: MultiFrequencyOptimizer(
        torch.optim.AdamW(m.parameters(), lr=lr), {"slow": 3}, level(m)
    ),
    "slow_rates": lambda m, lr=LR: MultiFrequencyOptimizer(
        LearnedRates(M3(m.parameters(), lr=lr, **M3_OPTIONS), level(m), 0.1), {"slow": 2}, level(m)
    ),
}
MAKERS = OWN | MADE
BUILT = {"combined", "combined_dgd", "adamw", "sgd"}
EVERY = pytest.mark.parametrize("name", MAKERS)


def backward(model, step):
    parameter = next(model.parameters())
    x = torch.randn(6, 3, 4, 3, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    model(x.to(parameter.dtype)).square().mean().backward()


def train(model, optimizer, first=1, last=5, set_to_none=True):
    for step in range(first, last + 1):
        optimizer.zero_grad(set_to_none)
        backward(model, step)
        optimizer.step()


def same(a, b, tolerance=0.0):
    for (name, x), y in zip(a.named_parameters(), b.named_parameters(), strict=True):
        torch.testing.assert_close(x, y[1], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


@EVERY
def test_the_layout_of_parameters_does_not_matter(name):
    plain, laid_out = Net(), Net(is_laid_out=True)
    train(plain, MAKERS[name](plain))
    train(laid_out, MAKERS[name](laid_out))
    same(plain, laid_out, 1e-9)
    assert laid_out.conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert all((a - b).norm() > 1e-6 for a, b in zip(plain.parameters(), Net().parameters(), strict=True))


@EVERY
@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_copy_goes_on_alone(name, way):
    model = Net()
    optimizer = MAKERS[name](model)
    train(model, optimizer, 1, 4)
    pair = (model, optimizer)
    copied, its_optimizer = copy.deepcopy(pair) if way == "deepcopy" else pickle.loads(pickle.dumps(pair))
    before = copy.deepcopy(model.state_dict())
    train(copied, its_optimizer, 5, 8)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    train(model, optimizer, 5, 8)
    same(model, copied)
    assert not torch.equal(model.linear.weight, before["linear.weight"])


@pytest.mark.parametrize("name", sorted(MAKERS.keys() - BUILT))
def test_a_group_is_added_with_a_rate_of_its_own(name):
    """As if it had been there from the start, with no gradients until now."""
    whole, grown = Net(), Net()
    frozen = [whole.scale, *whole.wide.parameters()]
    optimizer = MAKERS[name](whole)
    for p in [grown.scale, *grown.wide.parameters()]:
        p.requires_grad_(False)
    other = MAKERS[name](_Without(grown, {grown.scale, *grown.wide.parameters()}))
    for step in range(1, 7):
        if step == 3:
            added = [grown.scale, *grown.wide.parameters()]
            for p in added:
                p.requires_grad_(True)
            other.add_param_group({"params": added})
        for model, one in ((whole, optimizer), (grown, other)):
            one.zero_grad()
            backward(model, step)
        if step < 3:
            for p in frozen:
                p.grad = None
        optimizer.step()
        other.step()
    same(whole, grown, 1e-12)
    assert not torch.equal(grown.wide.weight, Net().wide.weight)


class _Without(nn.Module):
    """A model of which some parameters are not given to the optimizer."""

    def __init__(self, model, hidden):
        super().__init__()
        self.inner, self.linear, self.hidden = model, model.linear, hidden

    def parameters(self, recurse=True):
        seen = list(super().parameters(recurse))
        return iter([p for p in seen if p not in self.hidden or p.requires_grad])


def test_a_group_that_no_part_would_own_is_refused_through_a_wrapper():
    model = Net()
    wrapped = LearnedRates(by_name("adamw")(model), {})
    wrapped.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    assert len(wrapped.param_groups) == len(wrapped.optimizer.param_groups)
    with pytest.raises(ValueError, match="add a parameter group to a part before it is combined"):
        LearnedRates(by_name("m3")(model), {}).add_param_group({"params": [nn.Parameter(torch.ones(2))]})


@pytest.mark.parametrize("name", sorted(MAKERS.keys() - BUILT))
def test_a_rate_in_a_tensor(name):
    number, tensor = Net(), Net()
    train(number, MAKERS[name](number, lr=LR))
    train(tensor, MAKERS[name](tensor, lr=torch.tensor(LR, dtype=torch.float64)))
    same(number, tensor, 1e-12)


@EVERY
def test_gradients_of_zero_are_gradients(name):
    """`set_to_none=False` before the first step, and layers without a gradient."""
    none, zero = Net(), Net()
    optimizers = MAKERS[name](none), MAKERS[name](zero)
    train(none, optimizers[0], 1, 6)
    train(zero, optimizers[1], 1, 6, set_to_none=False)
    same(none, zero)
    zero.zero_grad(set_to_none=False)
    optimizers[1].step()
    before = copy.deepcopy(none.state_dict())
    none.zero_grad()
    optimizers[0].step()
    assert all(torch.equal(before[key], value) for key, value in none.state_dict().items())


@EVERY
def test_hooks_schedules_and_closures(name):
    model, reference = Net(), Net()
    optimizer, other = MAKERS[name](model), MAKERS[name](reference)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    schedules = [torch.optim.lr_scheduler.StepLR(o, 1, 0.5) for o in (optimizer, other)]
    for step in range(1, 4):

        def closure(step=step):
            optimizer.zero_grad()
            backward(model, step)
            return step

        assert optimizer.step(closure) == step
        train(reference, other, step, step)
        for schedule in schedules:
            schedule.step()
    assert calls == ["before", "after"] * 3
    assert {group["lr"] for group in optimizer.param_groups} == {LR / 8}
    same(model, reference)


@pytest.mark.parametrize("name", OWN)
def test_complex_parameters_and_flags_of_torch_are_refused(name):
    model = nn.Module()
    model.weight = nn.Parameter(torch.ones(2, 2, dtype=torch.complex64))
    optimizer = OWN[name](model)
    model.weight.abs().sum().backward()
    with pytest.raises(RuntimeError, match=r"complex parameters are not supported, .* \(2, 2\)"):
        optimizer.step()
    for flag in ("foreach", "maximize"):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{flag}'"):
            OWN[name](Net(), **{flag: True})


@pytest.mark.parametrize("name", OWN)
def test_momenta_are_float32_beside_bfloat16_also_when_loaded(name):
    model = Net(dtype=torch.bfloat16)
    optimizer = OWN[name](model)
    train(model, optimizer)
    other = OWN[name](model)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for state in (*optimizer.state.values(), *other.state.values()):
        kinds = {key: value.dtype for key, value in state.items() if torch.is_tensor(value)}
        assert set(kinds.values()) <= {torch.float32}, kinds


def test_the_adamw_of_m3_adds_up_small_gradients_beside_bfloat16_weights():
    """A mean of 0.9999 ᵗ-weighted gradients: in bfloat16 it would stay where it is."""
    p = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    exact = nn.Parameter(torch.ones(3))
    optimizers = [M3([q], lr=1e-3, adamw_betas=(0.999, 0.9999)) for q in (p, exact)]
    for step in range(100):
        for q, optimizer in zip((p, exact), optimizers, strict=True):
            q.grad = torch.full_like(q, 1.0 if step < 50 else 0.5)
            optimizer.step()
    a, b = (optimizer.state[q] for q, optimizer in zip((p, exact), optimizers, strict=True))
    torch.testing.assert_close(a["exp_avg"], b["exp_avg"], rtol=1e-6, atol=0)
    torch.testing.assert_close(a["exp_avg_sq"], b["exp_avg_sq"], rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["slow", "rates"])
def test_a_step_that_is_left_out_leaves_nothing_behind(name):
    """`found_inf` of a gradient scaler, with an inner optimizer that leaves the step out itself."""

    def make(model):
        inner = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)
        return (
            MultiFrequencyOptimizer(inner, {"slow": 3}, level(model))
            if name == "slow"
            else LearnedRates(inner, level(model), 0.1)
        )

    model, steps = Net(), []
    optimizer = make(model)
    for step in range(1, 7):
        optimizer.zero_grad()
        backward(model, step)
        if step == 2:
            for p in model.parameters():
                p.grad.fill_(float("nan"))
        before = copy.deepcopy(model.state_dict())
        optimizer.found_inf = torch.tensor(float(step == 2))
        optimizer.step()
        del optimizer.found_inf
        steps.append(any(not torch.equal(before[key], value) for key, value in model.state_dict().items()))
    assert steps == [True, False, True, True, True, True]
    assert all(p.isfinite().all() for p in model.parameters())
    assert all(torch.as_tensor(v).isfinite().all() for s in optimizer.state.values() for v in s.values())


@pytest.mark.slow
def test_a_compiled_step_of_m3_is_the_step_in_float32():
    models = [nn.Linear(16, 16) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [M3(m.parameters(), lr=0.01, slow_every=2, ns_dtype="float32") for m in models]
    steps = [optimizers[0].step, torch.compile(optimizers[1].step)]
    for number in range(1, 4):
        x = torch.randn(8, 16, generator=torch.Generator().manual_seed(number))
        for model, optimizer, step in zip(models, optimizers, steps, strict=True):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            step()
    same(*models, 1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
@pytest.mark.parametrize("name", ["lr", "weight_decay"])
def test_rates_that_are_no_rates_are_refused(name, value):
    with pytest.raises(ValueError, match=f"^{name} must be at least 0 and finite, got {value}"):
        M3([torch.nn.Parameter(torch.ones(2, 2))], **{name: value})
