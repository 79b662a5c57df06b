"""Which inputs count for optimizers that look at them: those of the passes that made the gradient."""

import copy
import pickle

import naive_optimizers as naive
import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.utils.checkpoint import checkpoint

from nested_learning.optim import DeltaGradientDescent, GeneralizedGradientDescent, MultiFrequencyOptimizer

LR = 0.3
EXACT = {"rtol": 1e-9, "atol": 1e-9}


def l2(model, **options):
    """Delta gradient descent again, but from the output gradients, by many small steps."""
    return GeneralizedGradientDescent(model, objective="l2", inner_steps=300, **options)


BOTH = pytest.mark.parametrize("make", [DeltaGradientDescent, l2])


def layer(seed=0):
    torch.manual_seed(seed)
    return nn.Linear(4, 3, bias=False).double()


def data(rows=7, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, n, generator=generator, dtype=torch.float64) for n in (4, 3)]


def loss_of(output, y):
    return 0.5 * (output - y).square().sum(-1).mean()


def expected(weight, *uses):
    """The proximal minimum for rows of (x, −N ∂L/∂y), where a use of N rows is worth a whole batch."""
    inputs, targets = (torch.cat(side).numpy() for side in zip(*uses, strict=True))
    return torch.from_numpy(naive.proximal(weight.detach().numpy(), inputs, targets, LR))


def check(module, optimizer, *uses):
    """Step, and compare with the naive minimum over `uses`, each a pair (inputs, targets)."""
    wanted = expected(module.weight, *uses)
    optimizer.step()
    torch.testing.assert_close(module.weight.detach(), wanted, **EXACT)


def plain_use(module, x, y):
    return x, y - x @ module.weight.detach().T


@BOTH
def test_zero_grad_between_forward_and_backward(make):
    module, (x, y) = layer(), data()
    optimizer = make(module, lr=LR)
    loss = loss_of(module(x), y)
    optimizer.zero_grad()
    loss.backward()
    check(module, optimizer, plain_use(module, x, y))


@BOTH
def test_forward_passes_that_were_thrown_away(make):
    module, (x, y) = layer(), data()
    optimizer = make(module, lr=LR)
    for seed in (2, 3):
        module(data(32, seed)[0])
    loss_of(module(x), y).backward()
    with torch.no_grad():
        module(100 * x)
    kept = module(5 * x)
    check(module, optimizer, plain_use(module, x, y))
    assert kept.requires_grad


@BOTH
def test_a_branch_that_was_thrown_away(make):
    module, (x, y) = layer(), data()
    optimizer = make(module, lr=LR)
    used, unused = module(x), module(data(5, 9)[0])
    (loss_of(used, y) + 0 * unused.detach().sum()).backward()
    check(module, optimizer, plain_use(module, x, y))


@BOTH
def test_backward_passes_add_up_until_the_step_and_no_longer(make):
    module = layer()
    optimizer = make(module, lr=LR)
    for first in (1, 3):
        batches = [data(6, first), data(6, first + 1)]
        for x, y in batches:
            (loss_of(module(x), y) / 2).backward()
        check(module, optimizer, *[plain_use(module, x, y) for x, y in batches])
        module.zero_grad()


@BOTH
def test_forgotten_gradients_take_their_inputs_along(make):
    module, (x, y) = layer(), data()
    optimizer = make(module, lr=LR)
    loss_of(module(5 * x), y).backward()
    optimizer.zero_grad()
    loss_of(module(x), y).backward()
    check(module, optimizer, plain_use(module, x, y))


@BOTH
@pytest.mark.parametrize("uses", [2, 3])
def test_a_weight_that_is_used_several_times_adds_up_its_uses(make, uses):
    """Each use is worth as much as the whole batch: G is a sum over uses of means over rows, and S too."""
    module = layer()
    optimizer = make(module, lr=LR)
    batches = [data(6, seed) for seed in range(uses)]
    sum(loss_of(module(x), y) for x, y in batches).backward()
    old = module.weight.detach().clone()
    optimizer.step()
    moment = sum(x.T @ x / len(x) for x, _ in batches)
    grad = sum((x @ old.T - y).T @ x / len(x) for x, y in batches)
    system = torch.eye(4, dtype=torch.float64) + LR * moment
    torch.testing.assert_close(module.weight.detach(), (old - LR * grad) @ torch.linalg.inv(system), **EXACT)


@BOTH
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_nothing(make, reentrant):
    plain, saving = layer(), layer()
    one, two = make(plain, lr=LR), make(saving, lr=LR)
    (x, y), (z, _) = data(), data(5, 2)
    x.requires_grad_()
    loss_of(plain(x), y).backward()
    loss_of(checkpoint(saving, x, use_reentrant=reentrant), y).backward()
    checkpoint(saving, z.requires_grad_(), use_reentrant=reentrant)  # thrown away
    one.step()
    two.step()
    torch.testing.assert_close(saving.weight, plain.weight, rtol=1e-13, atol=1e-13)
    assert not torch.equal(plain.weight, layer().weight)


@BOTH
def test_two_passes_through_one_graph_are_one_pass_of_the_sum(make):
    once, twice, (x, y) = layer(), layer(), data()
    one, two = make(once, lr=LR), make(twice, lr=LR)
    (3 * loss_of(once(x), y)).backward()
    loss = loss_of(twice(x), y)
    loss.backward(retain_graph=True)
    (2 * loss).backward(retain_graph=True)
    one.step()
    two.step()
    torch.testing.assert_close(twice.weight, once.weight, rtol=1e-12, atol=1e-12)
    two.zero_grad()
    loss.backward()  # of the old output once more: a new pass
    assert two.caught[twice.weight].rows == 7 and two.caught[twice.weight].loss_rows == 7


@BOTH
def test_frozen_weights_catch_nothing(make):
    module, (x, y) = layer(), data()
    optimizer = make(module, lr=LR)
    module.weight.requires_grad_(False)
    loss_of(module((5 * x).requires_grad_()), y).backward()
    module.weight.requires_grad_(True)
    loss_of(module(x), y).backward()
    check(module, optimizer, plain_use(module, x, y))


@BOTH
def test_eval_mode_keyword_inputs_and_other_shapes(make):
    module, (x, y) = layer().eval(), data(8)
    optimizer = make(module, lr=LR)
    loss_of(module(input=x.view(2, 4, 4)), y.view(2, 4, 3)).backward()
    check(module, optimizer, plain_use(module, x, y))


@BOTH
def test_autocast_does_not_round_what_is_caught(make):
    module = layer().float()
    optimizer = make(module, lr=LR)
    x = 1 + torch.arange(12.0).view(3, 4) / 1024  # bfloat16 has eight bits
    with torch.autocast("cpu", torch.bfloat16):
        output = module(x)
    output.float().sum().backward()
    caught = optimizer.caught[module.weight]
    seen = caught.uses[0].rows if caught.keep_rows else caught.gram
    torch.testing.assert_close(seen, x if caught.keep_rows else x.T @ x, rtol=1e-6, atol=0)


@BOTH
@pytest.mark.parametrize("way", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_see_their_own_passes(make, way):
    module, (x, y) = layer(), data()
    optimizer = make(module, lr=LR)
    copied, its_optimizer = way((module, optimizer))
    loss_of(module(5 * x), y).backward()
    loss_of(copied(x), y).backward()
    check(copied, its_optimizer, plain_use(copied, x, y))
    assert optimizer.caught[module.weight].rows == 7


@BOTH
def test_a_layer_that_no_pass_came_to_stays_and_one_that_was_not_seen_is_an_error(make):
    module = layer()
    optimizer = make(module, lr=LR, weight_decay=0.5)
    before = module.weight.detach().clone()
    module.weight.grad = torch.zeros_like(module.weight)
    optimizer.step()
    torch.testing.assert_close(module.weight.detach(), before * (1 - LR / 2))
    nn.functional.linear(data()[0], module.weight).sum().backward()
    with pytest.raises(RuntimeError, match=r"no input was caught for a linear weight of shape \(3, 4\)"):
        optimizer.step()


@BOTH
def test_a_layer_that_is_added_later_has_the_rule_too(make):
    model = nn.Sequential(layer(), nn.Tanh())
    optimizer = make(model, lr=LR)
    added = nn.Linear(3, 3, bias=False).double()
    model.append(added)
    optimizer.add_param_group({"params": added.parameters()})
    x, y = data()
    between = torch.tanh(x @ model[0].weight.detach().T)
    loss_of(model(x), y).backward()
    check(added, optimizer, plain_use(added, between, y))


@BOTH
def test_what_cannot_be_watched_is_refused(make):
    model = layer()
    with pytest.raises(TypeError, match=r"needs the module whose layers it watches, got generator"):
        make(model.parameters(), lr=LR)
    optimizer = make(model, lr=LR)
    with pytest.raises(ValueError, match=r"of the module given to .*, got one of shape \(2, 5\)"):
        optimizer.add_param_group({"params": nn.Linear(5, 2, bias=False).parameters()})
    assert len(optimizer.param_groups) == 1
    with pytest.raises(ValueError, match="looks at the inputs of one step cannot update slow levels"):
        MultiFrequencyOptimizer(optimizer, {"slow": 2}, {"slow": [model.weight]})


CHANGES = {
    "clip_grad_norm": lambda module, optimizer: clip_grad_norm_(module.parameters(), 0.1),
    "scale": lambda module, optimizer: module.weight.grad.mul_(0.25),
    "clip_grad_value": lambda module, optimizer: clip_grad_value_(module.parameters(), 0.05),
    "mask": lambda module, optimizer: module.weight.grad[1:].zero_(),
}


@BOTH
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_gradient_is_the_one_that_is_followed(make, change):
    """(W − ηG)(I + ηS)⁻¹ with the gradient as it is when the step is made."""
    module, (x, y) = layer(), data()
    optimizer = make(module, lr=LR)
    loss_of(module(x), y).backward()
    before = module.weight.grad.clone()
    CHANGES[change](module, optimizer)
    old, grad = module.weight.detach().clone(), module.weight.grad.clone()
    assert (grad - before).norm() > 0.1 * before.norm()
    optimizer.step()
    inverse = torch.linalg.inv(torch.eye(4, dtype=torch.float64) + LR * x.T @ x / len(x))
    torch.testing.assert_close(module.weight.detach(), (old - LR * grad) @ inverse, **EXACT)


@pytest.mark.parametrize("objective", ["dot", "l2", "huber"])
def test_clipped_norms_are_smaller_losses(objective):
    """Clipping by a factor is training on the loss times that factor, whatever the objective."""
    clipped, scaled, (x, y) = layer(), layer(), data()
    make = {"lr": LR, "objective": objective}
    one, two = GeneralizedGradientDescent(clipped, **make), GeneralizedGradientDescent(scaled, **make)
    loss_of(clipped(x), 50 * y).backward()
    norm = clip_grad_norm_(clipped.parameters(), 1.0)
    (loss_of(scaled(x), 50 * y) / (norm + 1e-6)).backward()
    one.step()
    two.step()
    torch.testing.assert_close(clipped.weight, scaled.weight, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("make", [DeltaGradientDescent, GeneralizedGradientDescent])
def test_a_scaled_loss_is_unscaled(make):
    """With torch's GradScaler; a step that it leaves out changes nothing and is forgotten."""
    plain, scaled, (x, y) = layer().float(), layer().float(), [t.float() for t in data()]
    one, two = make(plain, lr=LR), make(scaled, lr=LR)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    scaler.scale(loss_of(scaled(x * float("inf")), y)).backward()
    scaler.step(two)
    scaler.update()
    assert torch.equal(scaled.weight, plain.weight)
    for _ in range(3):
        one.zero_grad()
        two.zero_grad()
        loss_of(plain(x), 3 * y).backward()
        scaler.scale(loss_of(scaled(x), 3 * y)).backward()
        scaler.unscale_(two)
        one.step()
        scaler.step(two)
        scaler.update()
    torch.testing.assert_close(scaled.weight, plain.weight, rtol=1e-5, atol=1e-6)
    assert (plain.weight - layer().float().weight).norm() > 0.1
