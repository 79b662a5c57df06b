"""What a training step does beside model and optimizer stays on CUDA, and so does learning at test time.

Gradients are off here (see `fake_cuda`); `test_stand_in_card.py` has the backward passes.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from on_cuda import FAST, LENGTH, MLP, SLOW, devices_of, made_on_cuda, small, tokens
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException

from nested_learning.adapt import AdaptConfig, diff, memorize, restart, score
from nested_learning.adapt.config import PATHS, SURPRISES
from nested_learning.adapt.learn import relative_sizes, row_means, surprise, token_losses
from nested_learning.adapt.paths import fast_paths, learning_names, start
from nested_learning.data.loader import cut_rows, split_batch
from nested_learning.data.packing import split_documents
from nested_learning.models.lm import HopeLM
from nested_learning.optim.build import build_optimizer
from nested_learning.optim.config import OptimConfig
from nested_learning.train.checkpoint.tensors import pack
from nested_learning.train.compiling import why_eager
from nested_learning.train.config import RunConfig
from nested_learning.train.elastic import Anchor, elastic_penalty
from nested_learning.train.guard import UpdateGuard, find_nonfinite, first_nonfinite
from nested_learning.train.level_report import LevelWatch, fast_changes
from nested_learning.train.memory import check_memory
from nested_learning.train.metrics import memory_gib
from nested_learning.train.objective import count_targets, next_token_loss
from nested_learning.train.online import online_loss
from nested_learning.train.strategy.base import OneProcess

pytestmark = pytest.mark.usefixtures("fake_cuda")
CUDA = torch.device("cuda")


def model(**changes: Any) -> HopeLM:
    return made_on_cuda(lambda: HopeLM(small(**{"levels": (FAST, SLOW, MLP), "seq_len": 32, **changes})))


def test_a_batch_and_its_loss() -> None:
    batch = tokens(length=LENGTH + 1)
    inputs, targets = split_batch(batch)
    logits = torch.zeros(2, LENGTH, 11, device="cuda")
    found = [next_token_loss(logits, targets), next_token_loss(logits.bfloat16(), targets, count=3)]
    found += [inputs, targets, count_targets(targets), cut_rows(batch, 3), split_documents(batch)]
    assert devices_of(found) == {"cuda"}


def test_the_guard_of_a_run_waits_for_nothing() -> None:
    net = model()
    guard = UpdateGuard(build_optimizer(OptimConfig(), net), CUDA)
    assert guard.deferred
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    norm = OneProcess(CUDA).clip(net, 1.0)
    assert guard.step(torch.zeros((), device="cuda"), norm)
    assert devices_of(norm, guard.bad, guard.made, list(net.parameters())) == {"cuda"}
    with pytest.raises(DataDependentOutputException):  # it asks when a line is logged
        guard.check()


def test_the_search_for_numbers_that_are_not_finite_asks_once() -> None:
    with pytest.raises(DataDependentOutputException):
        first_nonfinite(model().named_parameters())
    with pytest.raises(DataDependentOutputException):
        find_nonfinite(model(), lambda: torch.zeros((), device="cuda"))


def test_what_levels_do_is_measured_against_a_start_on_the_host() -> None:
    net = model()
    watch = LevelWatch(net)
    assert devices_of(watch.start) == {"cpu"}
    assert devices_of(fast_changes(net, tokens()), watch._changes()) == {"cuda"}
    for name in ("slow", "fast"):
        with watch.frozen(name):
            assert devices_of(*net(tokens()), list(net.parameters())) == {"cuda"}


def test_elastic_weight_consolidation() -> None:
    net = made_on_cuda(lambda: nn.Linear(3, 3))
    weights = {name: p.detach().clone() for name, p in net.named_parameters()}
    assert devices_of(elastic_penalty([Anchor(weights=weights, importance=weights)], 1.0, net)) == {"cuda"}


class Card:
    """What torch says of a card."""

    total_memory = 2**20


def test_memory_is_that_of_the_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**30)
    assert memory_gib(CUDA) == 3.0
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Card)
    with pytest.raises(ValueError, match=r"the model is too large: .* on cuda, need 0\.0 GiB of 0\.0;"):
        check_memory(RunConfig(), OneProcess(CUDA))


def test_a_card_compiles_shorter_runs_than_a_cpu() -> None:
    config = RunConfig()
    config.train.steps = 100
    cpu = why_eager(config, torch.device("cpu"), "single")
    assert cpu is not None and "too short" in cpu
    assert "too short" not in (why_eager(config, CUDA, "single") or "")


@pytest.mark.parametrize("kind", SURPRISES)
def test_surprise(kind: str) -> None:
    logits, targets = torch.zeros(2, 5, 11, device="cuda"), tokens(length=5)
    losses = token_losses(logits, targets)
    found = [losses, row_means(losses, targets), surprise(kind, logits, targets, losses)]
    assert devices_of(found) == {"cuda"}


@pytest.mark.parametrize("paths", PATHS)
def test_states_that_learn(paths: str) -> None:
    net, config = model(mixer="titans"), AdaptConfig(paths=paths, chunk_size=4)
    state = start(net, 2, config)
    names = learning_names(net, state, config)
    weights = {name: state.named_tensors()[name] for name in names}
    logits, after = net(tokens(), state)
    again = restart(net, after, paths)
    assert fast_paths(net, again)
    assert devices_of(logits, after, again, diff(net, state, after)) == {"cuda"}
    assert devices_of(relative_sizes(weights, weights)) == {"cuda"}


@pytest.mark.thorough
def test_reading_without_learning() -> None:
    net, batch = model(mixer="titans"), tokens(length=LENGTH + 1)
    report, state = memorize(net, batch, config=AdaptConfig(lr=0.0, chunk_size=4, surprise="l2"))
    assert devices_of(report, state, score(net, batch)) == {"cuda"}
    assert devices_of(online_loss(net, batch, AdaptConfig(lr=0.0, chunk_size=4))) == {"cuda"}


def test_what_a_checkpoint_holds_is_not_copied() -> None:
    """Tensors go to a file from where they are; `test_strategies_name_their_device.py` has ranks."""
    net = model()
    optimizer = build_optimizer(OptimConfig(), net)
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    tensors, _ = pack(net, optimizer)
    assert devices_of(tensors) == {"cuda"}
