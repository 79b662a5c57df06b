"""The training loss with learning inside: its value, its gradient, and what it refuses."""

from typing import Any

import pytest
import torch
from tiny_adapt import FAST, PLAIN, VOCAB, text, tiny
from tolerances import assert_same
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from nested_learning.adapt import AdaptConfig, memorize
from nested_learning.adapt.learn import SHARES
from nested_learning.levels import LevelSpec
from nested_learning.models.config import HopeConfig
from nested_learning.models.lm import HopeLM
from nested_learning.train.config import RunConfig, TrainConfig
from nested_learning.train.online import online_loss

LENGTH = 2 * 2 * 22 * 8  # operations in a row: steps, layers, tokens that a memory passes, width
CHUNKS: dict[str, Any] = {"chunk_size": 5, "lr": 0.4, "steps": 2}


def gradient(model: HopeLM, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True))


@pytest.mark.parametrize(
    ("mixer", "paths"),
    [
        ("self_mod", "all"),
        ("self_mod_linear", "all"),
        ("titans", "titan"),
        ("linear", "all"),
        ("attention", "cms"),
    ],
)
def test_the_loss_is_that_of_learning_at_test_time(mixer: str, paths: str) -> None:
    model, tokens, config = tiny(mixer), text(), AdaptConfig(paths=paths, **CHUNKS)
    expected = memorize(model, tokens, config=config)[0].losses.mean()
    assert_same(online_loss(model, tokens, config), expected, LENGTH)
    with torch.no_grad():
        assert_same(online_loss(model, tokens, config), expected, LENGTH)


def test_the_loss_is_divided_by_the_targets_of_the_whole_step() -> None:
    model, tokens, config = tiny("attention", (PLAIN,)), text(4), AdaptConfig(paths="cms", **CHUNKS)
    whole = online_loss(model, tokens, config)
    parts = [online_loss(model, part, config, count=4 * 21) for part in tokens.chunk(2)]
    assert_same(parts[0] + parts[1], whole, LENGTH)
    first, second, both = (gradient(model, loss) for loss in (*parts, whole))
    assert_same([a + b for a, b in zip(first, second, strict=True)], both, LENGTH)


def test_padding_is_neither_scored_nor_learned_from() -> None:
    model, tokens, config = tiny("attention", (PLAIN,)), text(2), AdaptConfig(paths="cms", **CHUNKS)
    padded = tokens.clone()
    padded[1, 12:] = -100
    report, _ = memorize(model, padded, config=config)
    assert report.wrote.tolist() == [[True] * 5, [True] * 3 + [False] * 2]
    assert (report.losses[1, 11:] == 0).all()
    short, _ = memorize(model, tokens[1:, :12], config=config)
    assert_same(report.losses[1, :11], short.losses[0], LENGTH)
    value = online_loss(model, padded, config)
    assert_same(value, report.losses.sum() / (21 + 11), LENGTH)


def naive_first_order(model: HopeLM, tokens: Tensor, config: AdaptConfig) -> Tensor:
    """One row: the parameters of SwiGLUs are moved by constants, chunk after chunk."""
    parameters = dict(model.named_parameters())
    inner = [name for name in parameters if ".memory.levels." in name]
    moved, state, total = dict(parameters), None, torch.zeros((), dtype=torch.float64)
    for start in range(0, tokens.shape[1] - 1, config.chunk_size):
        targets = tokens[0, start + 1 : start + 1 + config.chunk_size]
        inputs = tokens[:, start : start + len(targets)]
        step = dict(moved)
        for i in range(config.steps):
            logits, after = functional_call(model, step, (inputs, state))
            losses = F.cross_entropy(logits[0], targets, reduction="none")
            if i == 0:
                total, following = total + losses.sum(), after
            moves = torch.autograd.grad(losses.mean(), [step[name] for name in inner], retain_graph=True)
            for name, move in zip(inner, moves, strict=True):
                step[name] = step[name] - config.lr * move.detach()
        moved, state = step, following
    return total / (tokens.shape[1] - 1)


def test_first_order_gradient_equals_that_of_a_loop_over_moved_parameters() -> None:
    model, tokens = tiny("attention", (PLAIN,)), text(1)
    config = AdaptConfig(paths="cms", chunk_size=5, lr=0.02, steps=2)
    expected = naive_first_order(model, tokens, config)
    loss = online_loss(model, tokens, config)
    assert_same(loss, expected, LENGTH)
    assert_same(gradient(model, loss), gradient(model, expected), LENGTH)


TWO_PLAIN = (LevelSpec(name="one"), LevelSpec(name="two"))


@pytest.mark.parametrize(
    ("mixer", "levels", "paths"),
    [
        ("attention", TWO_PLAIN, "cms"),
        ("sliding_attention", TWO_PLAIN, "cms"),
        ("self_mod", (FAST, PLAIN), "all"),
        ("titans", TWO_PLAIN, "titan"),
        ("linear", (FAST,), "cms_fast"),
    ],
)
def test_gradient_through_the_writes_by_finite_differences(
    mixer: str, levels: tuple[LevelSpec, ...], paths: str
) -> None:
    """Five chunks, two steps on each; and the first-order gradient is something else."""
    model, tokens = tiny(mixer, levels), text(2)
    config = AdaptConfig(paths=paths, **CHUNKS)
    parameters = list(model.parameters())
    exact = gradient(model, online_loss(model, tokens, config, through_write=True))
    first = gradient(model, online_loss(model, tokens, config))
    generator = torch.Generator().manual_seed(3)
    for _ in range(3):
        way = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in parameters]
        slope = sum(float((g * w).sum()) for g, w in zip(exact, way, strict=True))
        crude = sum(float((g * w).sum()) for g, w in zip(first, way, strict=True))
        ends = [loss_along(model, way, size, tokens, config) for size in (1e-8, -1e-8)]
        measured = (ends[0] - ends[1]) / 2e-8
        assert abs(slope - measured) < 1e-6 * abs(measured)
        assert abs(crude - measured) > 1e-3 * abs(measured)


def loss_along(model: HopeLM, way: list[Tensor], size: float, tokens: Tensor, config: AdaptConfig) -> float:
    moved = {n: p.detach() + size * w for (n, p), w in zip(model.named_parameters(), way, strict=True)}
    copy = HopeLM(model.config).double()
    copy.load_state_dict(moved)
    with torch.no_grad():
        return float(online_loss(copy, tokens, config))


@pytest.mark.thorough
@pytest.mark.parametrize("through", [False, True])
def test_training_the_start_makes_learning_better(through: bool) -> None:
    """Each text repeats a random word of its own, which only learning inside the text can know."""
    model = tiny("sliding_attention", (PLAIN,)).float()
    config = AdaptConfig(paths="cms", chunk_size=8, lr=1.0, steps=4)
    generator = torch.Generator().manual_seed(4)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)

    def batch() -> Tensor:
        word = torch.randint(VOCAB, (8, 8), generator=generator)
        return word.repeat(1, 5)

    held_out = batch()
    with torch.no_grad():
        before = online_loss(model, held_out, config)
    for _ in range(25):
        optimizer.zero_grad()
        online_loss(model, batch(), config, through).backward()
        optimizer.step()
    with torch.no_grad():
        after = online_loss(model, held_out, config)
        plain = F.cross_entropy(model(held_out[:, :-1])[0].flatten(0, 1), held_out[:, 1:].flatten())
    assert after < 0.9 * before
    assert after < plain - 0.05


def test_a_wrapper_is_called_and_its_module_gives_the_start() -> None:
    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module, self.calls = module, 0

        def forward(self, *args: Any) -> Any:
            self.calls += 1
            return self.module(*args)

    model, tokens, config = tiny(), text(), AdaptConfig(paths="all", chunk_size=7, lr=0.4)
    wrapped = Wrapper(model)
    assert torch.equal(online_loss(wrapped, tokens, config), online_loss(model, tokens, config))
    assert wrapped.calls == 3 + 2 * len(SHARES)  # every chunk, and what a step on all but the last would do


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train": {"inner": "offline"}}, "train.inner must be one of none, online, got 'offline'"),
        ({"train": {"grad_through_write": True}}, "grad_through_write must be false for train.inner = none"),
        ({"adapt": {"lr": 0.0}}, "adapt.lr must be positive for train.inner = online, got 0"),
        ({"adapt": {"chunk_size": 256}}, "adapt.chunk_size must be less than train.seq_len = 256"),
        ({"train": {"compile": True}}, "train.compile and parallel.activation_checkpointing must be false"),
        (
            {"train": {"grad_through_write": True, "compile": True}},
            "grad_through_write must be false for train.compile",
        ),
    ],
)
def test_what_cannot_work_is_refused(settings: dict[str, dict[str, Any]], message: str) -> None:
    train = {"inner": "online", **settings.get("train", {})}
    if "train.inner = none" in message:
        train["inner"] = "none"
    model = {"mixer": "attention", **settings.get("model", {})}
    with pytest.raises(ValueError, match=message):
        RunConfig(
            train=TrainConfig(**train),
            model=HopeConfig(**model),
            adapt=AdaptConfig(**settings.get("adapt", {})),
        )
