import copy

import pytest
import torch
from tiny import TinyModel
from torch import nn

from nested_learning.train.checkpoint import read_checkpoint
from nested_learning.train.guard import NonFiniteError, UpdateGuard, find_nonfinite


class Breaks(TinyModel):
    """Fine until `broken` is set: then one of its parts goes wrong."""

    broken: str | None = None

    def forward(self, tokens):
        x = self.norm(self.embedding(tokens))
        if self.broken == "gradient":
            x = x + torch.sqrt(self.embedding(tokens) * 0)  # finite, but its derivative is not
        return self.head(x), None


class Sick(nn.Module):
    def forward(self, x):
        return x * float("nan")


def break_norm(model):
    model.norm = Sick()


def break_gradient(model):
    model.broken = "gradient"


def break_parameter(model):
    model.head.bias.data[3] = float("inf")


@pytest.mark.parametrize(
    "damage, named",
    [
        (break_norm, "output of module 'norm'"),
        (break_gradient, "gradient of 'embedding.weight'"),
        (break_parameter, "parameter 'head.bias'"),
    ],
)
@pytest.mark.parametrize("deferred", [False, True])
def test_stops_before_the_update_and_names_the_tensor(make_trainer, damage, named, deferred):
    trainer = make_trainer(model=Breaks(), steps=8, save_every=2, log_every=3)
    trainer.guard = UpdateGuard(trainer.optimizer, trainer.device, deferred=deferred)
    before = {}

    def update(tokens, original=trainer.update):
        if trainer.step == 3:
            damage(trainer.model)
            before.update(copy.deepcopy(trainer.model.state_dict()))
        return original(tokens)

    trainer.update = update
    with pytest.raises(NonFiniteError, match=f"step 4: .* is {named}; .*step_00000002"):
        trainer.fit()
    after = trainer.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in after)
    assert [p.name for p in trainer.store.folders()] == ["step_00000002"]
    assert read_checkpoint(trainer.store.latest())["step"] == 2


def test_a_finite_run_is_the_same_with_and_without_waiting(make_trainer):
    now, later = make_trainer("now"), make_trainer("later")
    later.guard = UpdateGuard(later.optimizer, later.device, deferred=True)
    now.fit(), later.fit()
    for a, b in zip(now.model.parameters(), later.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_nothing_found_in_a_sound_model():
    model = TinyModel()
    tokens = torch.randint(257, (2, 5))
    assert find_nonfinite(model, lambda: model(tokens)[0].square().mean()) is None
    assert not model.norm._forward_hooks


def test_a_loss_that_is_not_finite_by_itself():
    model = TinyModel()
    tokens = torch.randint(257, (2, 5))
    assert find_nonfinite(model, lambda: model(tokens)[0].mean() / 0) == "loss"
