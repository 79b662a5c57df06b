import copy
import re

import pytest
import torch
from tolerances import assert_same
from torch import nn
from torch.nn import functional as F

from nested_learning import ChunkedUpdateScheduler, NestedModel, setup_optimizers
from nested_learning.models.nested_mlp import AuxiliaryHeads
from nested_learning.optim import LearnedRates, MultiFrequencyOptimizer

SIZES = {"level1_fast": 1, "level2_medium": 3, "level3_slow": 4}


pytestmark = pytest.mark.usefixtures("one_thread")  # models this small are slower on several


def make(**options):
    torch.manual_seed(0)
    return NestedModel(6, 10, **options).double()


def data(step):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(3, 5, 6, generator=generator, dtype=torch.float64)
    return x, x.flip(-1).cumsum(-1) / 2


def by_hand(model, x):
    """The LSTM's gates one step at a time, and the feed-forward levels from their weights."""
    lstm, medium, slow = model.levels["level1_fast"].lstm, *list(model.levels.values())[1:]
    h = c = torch.zeros(x.shape[0], 6, dtype=x.dtype)
    states = []
    for t in range(x.shape[1]):
        gates = F.linear(x[:, t], lstm.weight_ih_l0, lstm.bias_ih_l0) + F.linear(
            h, lstm.weight_hh_l0, lstm.bias_hh_l0
        )
        i, f, g, o = gates.chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        states.append(h)
    y = torch.stack(states, 1)
    y = (
        y
        + F.gelu(medium.norm(y) @ medium.up.weight.T + medium.up.bias) @ medium.down.weight.T
        + medium.down.bias
    )
    return F.gelu(slow.norm(y) @ slow.up.weight.T + slow.up.bias) @ slow.down.weight.T + slow.down.bias


def test_equals_the_levels_by_hand():
    model = make(output_size=4)
    x, _ = data(0)
    assert_same(model(x), by_hand(model, x), length=5 * 10)
    assert_same(model(x[:, 0]), by_hand(model, x[:, :1])[:, 0], length=10)
    assert list(model.levels) == ["level1_fast", "level2_medium", "level3_slow"]


def loop(model, optimizers, steps):
    """The training loop of the documentation; which level changed at which step."""
    scheduler = ChunkedUpdateScheduler(SIZES)
    changed = {name: [] for name in SIZES}
    for step in range(1, steps + 1):
        x, targets = data(step)
        before = copy.deepcopy(model.state_dict())
        F.mse_loss(model(x), targets).backward()
        for name, module in model.levels.items():
            if scheduler.should_update(name, step):
                optimizers[name].step()
                scheduler.mark_updated(name, step)
                module.zero_grad()
        for name in SIZES:
            if any(not torch.equal(v, before[k]) for k, v in model.state_dict().items() if name in k):
                changed[name].append(step)
    return changed, scheduler


@pytest.mark.parametrize("kind", ["adam", "adamw", "sgd"])
def test_the_loop_changes_every_level_at_its_steps_and_equals_the_wrapped_optimizer(kind):
    model, other = make(), make()
    optimizers = setup_optimizers(model=model, periods=SIZES, base_lr=1e-2, optimizer_type=kind)
    changed, scheduler = loop(model, optimizers, 12)
    assert changed == scheduler.calendar(12)
    makers = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
    levels = {name: list(level.parameters()) for name, level in other.levels.items()}
    wrapped = MultiFrequencyOptimizer(makers[kind](other.parameters(), lr=1e-2), SIZES, levels)
    for step in range(1, 13):
        x, targets = data(step)
        wrapped.zero_grad()
        F.mse_loss(other(x), targets).backward()
        wrapped.step()
    assert_same(list(model.parameters()), list(other.parameters()), length=12 * 5 * 10)


def test_learning_rates_are_scaled_by_period():
    optimizers = setup_optimizers(make(), SIZES, base_lr=0.6, optimizer_type="sgd")
    assert [o.param_groups[0]["lr"] for o in optimizers.values()] == pytest.approx([0.6, 0.2, 0.15])


def test_learned_rates_lower_the_loss_below_that_of_the_same_fixed_rates():
    losses = {}
    for learn in (None, 0.1):
        model = make()
        loop(model, setup_optimizers(model, SIZES, 3e-2, "sgd", learn_rates=learn), 60)
        losses[learn] = sum(
            F.mse_loss(model(data(step)[0]), data(step)[1]).item() for step in range(100, 110)
        )
    assert losses[0.1] < 0.95 * losses[None]
    optimizers = setup_optimizers(make(), SIZES, learn_rates=0.1)
    assert all(isinstance(o, LearnedRates) for o in optimizers.values())


def test_auxiliary_losses_by_hand():
    model = make()
    heads = AuxiliaryHeads(model, {"level1_fast": 0.3, "level2_medium": 0.5}).double()
    x, targets = data(0)
    found = model.activations(x)
    loss = heads(found, targets, F.mse_loss)
    expected = 0.0
    for name, weight in (("level1_fast", 0.3), ("level2_medium", 0.5)):
        head = heads.heads[name]
        guess = found[name] @ head.weight.T + head.bias
        expected = expected + weight * (guess - targets).square().mean()
    assert_same(loss, expected, length=10)
    loss.backward()
    reached = {
        name: any(p.grad is not None for p in level.parameters()) for name, level in model.levels.items()
    }
    assert reached == {"level1_fast": True, "level2_medium": True, "level3_slow": False}


def test_an_auxiliary_loss_makes_its_level_predict_by_itself():
    """With the weight of its head's loss, level 1 comes to hold the answer; without, it need not."""
    errors = {}
    for weight in (0.0, 1.0):
        model = make()
        heads = AuxiliaryHeads(model, {"level1_fast": 1.0}).double()
        optimizer = torch.optim.Adam([*model.parameters(), *heads.parameters()], lr=1e-2)
        for step in range(1, 81):
            x, targets = data(step)
            found = model.activations(x)
            inner = {"level1_fast": found["level1_fast"] if weight else found["level1_fast"].detach()}
            optimizer.zero_grad()
            (F.mse_loss(found["level3_slow"], targets) + heads(inner, targets, F.mse_loss)).backward()
            optimizer.step()
        x, targets = data(0)
        errors[weight] = heads.losses(model.activations(x), targets, F.mse_loss)["level1_fast"].item()
    assert errors[1.0] < 0.9 * errors[0.0]


def with_head():
    model = make()
    model.head = nn.Linear(2, 2)
    return model


@pytest.mark.parametrize(
    "act, message",
    [
        (lambda: NestedModel(6, 0), "hidden_size must be at least 1, got 0"),
        (
            lambda: make()(torch.zeros(2, 5)),
            "input must be [batch, time, 6] or [batch, 6], not empty, got float32 [2, 5]",
        ),
        (
            lambda: setup_optimizers(make(), SIZES, optimizer_type="lion"),
            "one of adam, adamw, sgd, got 'lion'",
        ),
        (lambda: setup_optimizers(make(), SIZES, base_lr=0), "base_lr must be positive, got 0"),
        (
            lambda: setup_optimizers(make(), {"level1_fast": 1}),
            "periods must name the levels ['level1_fast',",
        ),
        (
            lambda: setup_optimizers(make(), {**SIZES, "level3_slow": 0}),
            "['level3_slow'] must be at least 1, got 0",
        ),
        (lambda: setup_optimizers(with_head(), SIZES), "would never be updated: head.weight, head.bias"),
        (lambda: AuxiliaryHeads(make(), {}), "weights must name at least one of level1_fast, level2_medium"),
        (
            lambda: AuxiliaryHeads(make(), {"level3_slow": 1.0}),
            "must name levels of level1_fast, level2_medium, got",
        ),
        (
            lambda: AuxiliaryHeads(make(), {"level1_fast": 0.0}),
            "weights['level1_fast'] must be positive and finite, got 0.0",
        ),
    ],
)
def test_errors(act, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        act()
