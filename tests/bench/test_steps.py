"""What is timed does what it says."""

import pytest
import torch
from tolerances import assert_same
from torch.nn import functional as F

from nested_learning.bench import steps
from nested_learning.bench.settings import Case, build_model, smoke_settings

SELF_MOD = Case("self_mod", "self_mod", 8)


def test_training_step_leaves_the_gradient_of_the_mean_loss():
    settings = smoke_settings()
    model, same = build_model(settings, SELF_MOD), build_model(settings, SELF_MOD)
    step = steps.training_step(model, settings, batch=2, length=24)
    step()
    step()  # gradients of one step, not of two
    tokens = steps.random_tokens(settings, 2, 25)
    F.cross_entropy(same(tokens[:, :-1])[0].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    for ours, theirs in zip(model.parameters(), same.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-7)


def test_optimizer_step_moves_every_parameter():
    settings = smoke_settings()
    settings.optimizer = True
    model = build_model(settings, SELF_MOD)
    before = [p.detach().clone() for p in model.parameters()]
    steps.training_step(model, settings, batch=2, length=24)()
    assert all((p != b).any() for p, b in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("mixer", ["self_mod", "attention"])
def test_decoding_goes_on_from_its_prefix(mixer: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(steps, "BLOCK", 7)
    settings = smoke_settings()
    model = build_model(settings, Case(mixer, mixer, 8))
    decoding = steps.Decoding(model, settings, position=20, tokens=5)
    decoding()
    decoding()
    new = steps.random_tokens(settings, 1, 5)
    whole = torch.cat([steps.random_tokens(settings, 1, 20), new, new], 1)
    with torch.no_grad():
        _, expected = model(whole)
    assert decoding.state.position == 30
    assert decoding.state_floats() == expected.numel()
    assert_same(decoding.state.tensors(), expected.tensors(), length=30 * settings.dim, factor=1)
