"""Learning at test time against loops that keep explicit copies of the weights, and what must not change."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_adapt import FAST, PLAIN, text, tiny
from tolerances import assert_same
from torch import Tensor
from torch.nn import functional as F

from nested_learning.adapt import (
    AdaptConfig,
    checksum,
    diff,
    fast_paths,
    memorize,
    memorize_each,
    restart,
    score,
)
from nested_learning.adapt.learn import surprise, token_losses
from nested_learning.layers.mlp import SwiGLU
from nested_learning.models.lm import HopeLM
from nested_learning.state import State, load_state

LENGTH = 3 * 2 * 22 * 8  # operations in a row: steps, layers, tokens that a memory passes, width
CASES = [
    ("self_mod", "titan"),
    ("self_mod", "cms_fast"),
    ("self_mod", "all"),
    ("self_mod_linear", "titan"),
    ("titans", "titan"),
    ("linear", "titan"),
    ("attention", "cms"),
    ("sliding_attention", "cms"),
]


def equal(a: State, b: State) -> bool:
    """Bit for bit; without the spare room of key-value caches, which holds anything."""
    first, second = a.detach().named_tensors(), b.detach().named_tensors()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def learned(model: HopeLM, state: State) -> dict[str, Tensor]:
    tensors = state.named_tensors()
    return {name: tensors[name] for names in fast_paths(model, state).values() for name in names}


@pytest.mark.parametrize(
    "mixer", ["self_mod", "self_mod_linear", "titans", "linear", "attention", "sliding_attention"]
)
@pytest.mark.parametrize("steps", [1, 3])
def test_ordinary_levels_learn_as_copied_parameters_would(mixer: str, steps: int) -> None:
    """The oracle trains the parameters of a copy of the model by hand, on one row."""
    model, tokens = tiny(mixer, (PLAIN,)), text(1)
    config = AdaptConfig(paths="cms", chunk_size=5, steps=steps, lr=0.01)
    report, state = memorize(model, tokens, config=config)

    copy = deepcopy(model)
    weights = [p for m in copy.modules() if isinstance(m, SwiGLU) for p in m.parameters()]
    expected, before = [], None
    for start in range(0, 21, 5):
        inputs, targets = tokens[:, start : start + 5], tokens[0, start + 1 : start + 6]
        inputs = inputs[:, : len(targets)]
        for step in range(steps):
            logits, after = copy(inputs, before)
            losses = F.cross_entropy(logits[0], targets, reduction="none")
            if step == 0:
                expected.append(losses.detach())
                following = after.detach()
            gradients = torch.autograd.grad(losses.sum() / len(targets), weights)
            with torch.no_grad():
                for weight, gradient in zip(weights, gradients, strict=True):
                    weight -= 0.01 * gradient
        before = following
    assert_same(report.losses[0], torch.cat(expected), LENGTH)
    for value, weight in zip(learned_plain(model, state), weights, strict=True):
        assert_same(value[0], weight.detach(), LENGTH)


def learned_plain(model: HopeLM, state: State) -> list[Tensor]:
    tensors = state.named_tensors()
    return [tensors[name] for name in fast_paths(model, state)["cms_plain"]]


@pytest.mark.parametrize(("mixer", "paths"), CASES)
def test_what_is_written_is_the_gradient_of_the_loss_by_finite_differences(mixer: str, paths: str) -> None:
    """The chunk is longer than that of the layers' own writes, so the gradient passes through those too."""
    model, tokens = tiny(mixer), text(2, 12)
    config = AdaptConfig(paths=paths, chunk_size=11, lr=1e-5)
    start = model.init_state(2, plain=paths in ("cms", "all")).detach().map(Tensor.double)
    _, after = memorize(model, tokens, start, config)
    _, without = memorize(model, tokens, start, AdaptConfig(paths=paths, chunk_size=11, lr=0.0))
    chosen = {"titan": ["titan"], "cms_fast": ["cms_fast"], "cms": ["cms_fast", "cms_plain"]}
    found = fast_paths(model, start)
    names = [name for path in chosen.get(paths, found) for name in found[path]]
    first, moved, still = start.named_tensors(), after.named_tensors(), without.named_tensors()
    generator = torch.Generator().manual_seed(2)
    ways = {name: torch.randn(first[name].shape, generator=generator, dtype=torch.float64) for name in names}

    def loss(size: float) -> Tensor:
        shifted = start.replace({name: first[name] + size * ways[name] for name in names})
        return score(model, tokens, shifted)[0].mean(1)

    slope = (loss(1e-7) - loss(-1e-7)) / 2e-7  # [B]
    written = sum(((moved[name] - still[name]) * ways[name]).flatten(1).sum(1) for name in names)
    assert (slope.abs() > 1e-3).all()
    torch.testing.assert_close(written, -1e-5 * slope, rtol=1e-5, atol=1e-12)
    others = first.keys() - set(names)
    assert all(torch.equal(moved[name], still[name]) for name in others if name in moved)


@pytest.mark.parametrize(("mixer", "paths"), CASES)
def test_a_token_is_scored_before_it_is_learned_from(mixer: str, paths: str) -> None:
    model, tokens = tiny(mixer), text()
    config = AdaptConfig(paths=paths, chunk_size=5, lr=0.5, steps=2)
    report, _ = memorize(model, tokens, config=config)
    changed = tokens.clone()
    changed[:, 11:] = (changed[:, 11:] + 1) % 13  # token 10 is the last target of the second chunk
    other, _ = memorize(model, changed, config=config)
    assert torch.equal(report.losses[:, :10], other.losses[:, :10])
    assert not torch.equal(report.losses[:, 10:], other.losses[:, 10:])
    _, early = memorize(model, tokens[:, :11], config=config)
    alone, _ = score(model, tokens[:, 10:16], early)
    assert_same(report.losses[:, 10:15], alone, LENGTH)
    plain, _ = score(model, tokens)
    assert_same(report.losses[:, :5], plain[:, :5], LENGTH)
    assert ((report.losses - plain).abs()[:, 5:].amax(1) > 1e-6).all()  # later ones do know what was learned


@pytest.mark.parametrize(("mixer", "paths"), CASES)
def test_learning_leaves_the_model_as_it_is(mixer: str, paths: str) -> None:
    model = tiny(mixer)
    before = checksum(model)
    with torch.no_grad():
        _, state = memorize(model, text(), config=AdaptConfig(paths=paths, chunk_size=5, lr=1.0, steps=2))
    assert checksum(model) == before
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(t.requires_grad for t in state.tensors())


def test_the_checksum_sees_one_bit() -> None:
    model = tiny()
    model.register_buffer("scalar", torch.tensor(1.0, dtype=torch.bfloat16))
    before = checksum(model)
    with torch.no_grad():
        model.norm.weight[0] = torch.nextafter(model.norm.weight[0], torch.tensor(9.0, dtype=torch.float64))
    assert checksum(model) != before


@pytest.mark.parametrize(("mixer", "paths"), CASES)
def test_rows_do_not_know_of_each_other(mixer: str, paths: str) -> None:
    model, tokens = tiny(mixer), text()
    config = AdaptConfig(paths=paths, chunk_size=5, lr=0.5, steps=2)
    report, state = memorize(model, tokens, config=config)
    changed = tokens.clone()
    changed[1] = (changed[1] + 1) % 13
    other, moved = memorize(model, changed, config=config)
    rest = torch.tensor([0, 2])
    assert torch.equal(report.losses[rest], other.losses[rest])
    assert not torch.equal(report.losses[1], other.losses[1])
    assert equal(state.rows(rest), moved.rows(rest))
    single, alone = memorize(model, tokens[2:], config=config)
    assert_same(single.losses[0], report.losses[2], LENGTH)
    for name, value in learned(model, alone).items():
        assert_same(value[0], learned(model, state)[name][2], LENGTH)


@pytest.mark.parametrize(("mixer", "paths"), CASES)
def test_a_learning_rate_of_zero_is_the_plain_model(mixer: str, paths: str) -> None:
    model, tokens = tiny(mixer).float(), text()
    report, state = memorize(model, tokens, config=AdaptConfig(paths=paths, chunk_size=5, lr=0.0))
    before, losses = None, []
    for start in range(0, 21, 5):
        some, before = score(model, tokens[:, start : start + 6], before)
        losses.append(some)
    assert torch.equal(report.losses, torch.cat(losses, 1))
    assert equal(state, before)
    assert not report.wrote.any()
    assert_same(report.losses, score(model, tokens)[0], LENGTH, factor=1)


@pytest.mark.parametrize(("mixer", "paths"), CASES)
def test_a_text_may_come_in_parts(mixer: str, paths: str) -> None:
    model, tokens = tiny(mixer), text()
    config = AdaptConfig(paths=paths, chunk_size=5, lr=0.5)
    whole, end = memorize(model, tokens, config=config)
    first, state = memorize(model, tokens[:, :11], config=config)
    second, state = memorize(model, tokens[:, 10:], state, config)
    assert torch.equal(whole.losses, torch.cat([first.losses, second.losses], 1))
    assert torch.equal(whole.wrote, torch.cat([first.wrote, second.wrote], 1))
    assert equal(end, state)


def naive_surprise(kind: str) -> Callable[[Tensor, Tensor], Tensor]:
    """Of one row: `logits [t, V]`, `targets [t]` to a number."""

    def l2(logits: Tensor, targets: Tensor) -> Tensor:
        logits = logits.detach().requires_grad_()
        (signal,) = torch.autograd.grad(F.cross_entropy(logits, targets, reduction="sum"), logits)
        return torch.sqrt((signal**2).sum() / len(targets))

    def entropy(logits: Tensor, targets: Tensor) -> Tensor:
        return torch.distributions.Categorical(logits=logits).entropy().mean()

    return {"l2": l2, "loss": F.cross_entropy, "logit_entropy": entropy}[kind]


@pytest.mark.parametrize("kind", ["l2", "loss", "logit_entropy"])
def test_rows_below_the_threshold_do_not_learn(kind: str) -> None:
    model, tokens = tiny("attention"), text(length=6)
    logits = model(tokens[:, :-1])[0].detach()
    amounts = torch.stack([naive_surprise(kind)(logits[b], tokens[b, 1:]) for b in range(3)])
    low, middle, high = amounts.sort().indices.tolist()
    options: dict[str, Any] = {"paths": "cms", "chunk_size": 5, "lr": 0.5, "steps": 2}
    free, all_learned = memorize(model, tokens, config=AdaptConfig(**options))
    assert free.wrote.all()
    threshold = float(amounts[middle])
    for limit in (threshold - 1e-9, threshold + 1e-9):  # reached by two rows, then by one
        config = AdaptConfig(**options, surprise=kind, threshold=limit)
        report, state = memorize(model, tokens, config=config)
        assert_same(report.surprise[:, 0], amounts, LENGTH)
        assert torch.equal(report.losses, free.losses)
        wrote = {high, middle} if limit < threshold else {high}
        assert report.wrote[:, 0].nonzero().flatten().tolist() == sorted(wrote)
        start = model.init_state(3, plain=True)
        for row in range(3):
            as_expected = all_learned if row in wrote else start
            for name, value in learned_by_row(model, state, row).items():
                assert torch.equal(value, learned_by_row(model, as_expected, row)[name])
    moved = diff(model, model.init_state(3, plain=True), state)["cms_plain"]["layers.1"]
    assert moved[low] == 0 and moved[middle] == 0 and moved[high] > 0


def learned_by_row(model: HopeLM, state: State, row: int) -> dict[str, Tensor]:
    tensors = state.named_tensors()
    return {name: tensors[name][row] for name in fast_paths(model, state)["cms_plain"]}


def test_surprise_of_certain_predictions() -> None:
    targets = torch.tensor([[0, 0], [1, 1]])
    logits = torch.tensor([40.0, 0.0, 0.0]).expand(2, 2, 3)  # certain of token 0
    values = surprise("l2", logits, targets, token_losses(logits, targets))
    torch.testing.assert_close(values, torch.tensor([0.0, 2**0.5]))


def test_a_memory_can_be_saved_forked_and_compared(tmp_path: Path) -> None:
    model, tokens = tiny(), text()
    config = AdaptConfig(paths="all", chunk_size=5, lr=0.5)
    _, state = memorize(model, tokens, config=config)
    state.save(tmp_path / "memory.pt")
    loaded = load_state(tmp_path / "memory.pt")
    assert equal(loaded, state)
    more = text(seed=5)
    going_on, after = memorize(model, more, state, config)
    again, reloaded = memorize(model, more, loaded, config)
    assert torch.equal(going_on.losses, again.losses) and equal(after, reloaded)

    fork = state.rows(torch.tensor([2, 2]))
    both = torch.stack([more[2], more[0]])
    report, forked = memorize(model, both, fork, config)
    assert_same(report.losses[0], going_on.losses[2], LENGTH)
    assert equal(loaded, state)  # the fork went its own way

    far = diff(model, fork, forked)
    assert far.keys() == {"titan", "cms_fast", "cms_plain"}
    assert far["titan"].keys() == {"layers.0", "layers.1"}
    name = "layers.1.memory.levels.1"
    a, b = (
        torch.cat([s.named_tensors()[f"{name}.{part}"][0].flatten() for part in ("w_in", "w_out")])
        for s in (fork, forked)
    )
    assert_same(far["cms_plain"]["layers.1"][0], (b - a).norm() / a.norm(), length=3 * 8 * 24)
    assert all(
        (value == 0).all() for layers in diff(model, state, loaded).values() for value in layers.values()
    )


def test_restart_keeps_what_was_learned_and_forgets_the_context() -> None:
    model, tokens = tiny(), text()
    _, state = memorize(model, tokens, config=AdaptConfig(paths="all", chunk_size=5, lr=0.5))
    kept = restart(model, state, "cms")
    assert kept.position == 0
    old, fresh = state.named_tensors(), model.init_state(3, plain=True).named_tensors()
    paths = fast_paths(model, kept)
    for name, value in kept.named_tensors().items():
        origin = old if name in (*paths["cms_fast"], *paths["cms_plain"]) else fresh
        assert torch.equal(value, origin[name]), name
    assert "cms_plain" not in fast_paths(model, restart(model, state, "titan"))
    with pytest.raises(ValueError, match="paths must be one of titan, cms_fast, cms, all, got 'mlp'"):
        restart(model, state, "mlp")


def test_samples_reset_or_carry_on() -> None:
    model = tiny()
    samples = [text(seed=seed) for seed in (1, 2)]
    options: dict[str, Any] = {"paths": "cms", "chunk_size": 5, "lr": 0.5}
    (_, state), (kept, _) = memorize_each(model, samples, AdaptConfig(**options, reset=False))
    expected, _ = memorize(model, samples[1], restart(model, state, "cms"), AdaptConfig(**options))
    assert torch.equal(kept.losses, expected.losses)
    _, (forgot, _) = memorize_each(model, samples, AdaptConfig(**options))
    alone, _ = memorize(model, samples[1], None, AdaptConfig(**options))
    assert torch.equal(forgot.losses, alone.losses) and not torch.equal(forgot.losses, kept.losses)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"paths": "mlp"}, "adapt.paths must be one of titan, cms_fast, cms, all, got 'mlp'"),
        ({"surprise": "l1"}, "adapt.surprise must be one of none, l2, loss, logit_entropy, got 'l1'"),
        ({"chunk_size": 0}, "adapt.chunk_size must be at least 1, got 0"),
        ({"steps": 0}, "adapt.steps must be at least 1, got 0"),
        ({"lr": -0.1}, "adapt.lr must be at least 0, got -0.1"),
        ({"threshold": 0.5}, "adapt.threshold must be 0 for adapt.surprise = none, got 0.5"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdaptConfig(**options)


def test_paths_that_a_model_or_state_lacks_are_refused() -> None:
    model, tokens = tiny("attention"), text()
    with pytest.raises(ValueError, match="= titan selects no weights of this model; it has cms_fast"):
        memorize(model, tokens, config=AdaptConfig(paths="titan"))
    _, plain = score(model, tokens)
    with pytest.raises(ValueError, match="= cms makes cms_plain learn, but the state does not hold"):
        memorize(model, tokens, plain, AdaptConfig(paths="cms"))
    with pytest.raises(ValueError, match=r"length of at least 2, got \(3, 1\)"):
        memorize(model, tokens[:, :1])
    with torch.inference_mode(), pytest.raises(RuntimeError, match="torch.no_grad"):
        memorize(model, tokens)
    with pytest.raises(ValueError, match="different weights"):
        diff(model, plain, model.init_state(3, plain=True))


def test_a_model_with_states_of_its_own_names_its_weights() -> None:
    class Own(HopeLM):
        def fast_paths(self, state: State) -> dict[str, list[str]]:
            return {"cms_plain": ["layers.1.memory.levels.1.w_out"]}

    model = tiny("attention", (FAST, PLAIN))
    model.__class__ = Own
    _, state = memorize(model, text(), config=AdaptConfig(paths="cms", chunk_size=5, lr=0.5))
    start = model.init_state(3, plain=True).detach().named_tensors()
    name = "layers.1.memory.levels.1"
    assert not torch.equal(state.named_tensors()[f"{name}.w_out"], start[f"{name}.w_out"])
    assert torch.equal(state.named_tensors()[f"{name}.w_in"], start[f"{name}.w_in"])


@pytest.mark.parametrize("mixer", ["self_mod", "self_mod_linear", "titans", "linear", "attention"])
def test_mixed_precision_learns_the_same_in_float32_weights(mixer: str) -> None:
    """Layers with a backward pass derived by hand must not see autocast in it.

    Without the fast level's norm, which magnifies rounding where an untrained level answers almost 0.
    """
    model, tokens = tiny(mixer, (replace(FAST, gain=None), PLAIN)).float(), text()
    config = AdaptConfig(paths="all", chunk_size=5, lr=0.05, steps=2)
    exact, state = memorize(model, tokens, config=config)
    with torch.autocast("cpu", torch.bfloat16):
        report, low = memorize(model, tokens, config=config)
    torch.testing.assert_close(report.losses, exact.losses, rtol=0.1, atol=0.1)
    start = model.init_state(3, plain=True).detach().named_tensors()
    for name, value in learned(model, low).items():
        assert value.dtype == torch.float32
        moves = [(end - start[name]).flatten() for end in (learned(model, state)[name], value)]
        assert torch.cosine_similarity(*moves, dim=0) > 0.9, name
