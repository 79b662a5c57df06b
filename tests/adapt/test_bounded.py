"""No rate, however large, and no number of steps and layers makes learning worse than none."""

import math

import pytest
import torch
from tiny_adapt import FAST, PLAIN, text, tiny
from torch import Tensor

from nested_learning.adapt import AdaptConfig, fast_paths, memorize, restart, score
from nested_learning.adapt.learn import REACH, STEP
from nested_learning.levels import LevelSpec
from nested_learning.train.online import online_loss

RATES = (1e-3, 1.0, 30.0, 1e3, 1e30)
MIXERS = [
    ("attention", "cms"),
    ("self_mod", "all"),
    ("self_mod_linear", "titan"),
    ("titans", "titan"),
    ("linear", "titan"),
]
TEXT = text(2, 25)


def second_reading(model, config: AdaptConfig, tokens: Tensor = TEXT) -> tuple[Tensor, dict[str, Tensor]]:
    """Losses of rows in a new context that keeps what was learned, and the weights that can learn."""
    _, state = memorize(model, tokens, config=config)
    memory = restart(model, state, config.paths)
    tensors = memory.named_tensors()
    names = [name for names in fast_paths(model, memory).values() for name in names]
    return score(model, tokens, memory)[0].mean(1), {name: tensors[name] for name in names}


def check(model, paths: str, rate: float, steps: int, slack: float = 0.0) -> None:
    """Not worse than without learning, and no weight farther from its start than it may be.

    slack: By which part of its loss a row may be worse: steps are judged by their chunk, not by the text.
    """
    nothing, _ = second_reading(model, AdaptConfig(paths=paths, chunk_size=8, lr=0.0))
    learned, weights = second_reading(model, AdaptConfig(paths=paths, chunk_size=8, lr=rate, steps=steps))
    assert (learned <= nothing * (1 + slack) + 1e-6).all(), (learned, nothing)
    first = model.init_state(2, plain=paths in ("cms", "all")).named_tensors()
    for name, weight in weights.items():
        assert weight.isfinite().all()
        if "levels.1" in name or "mlps" in name:  # no writes of its own
            moved = (weight - first[name]).flatten(1).norm(dim=1)
            assert (moved <= REACH * first[name].flatten(1).norm(dim=1) * (1 + 1e-5)).all()


@pytest.mark.thorough
@pytest.mark.parametrize("steps", [1, 8])
@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize(("mixer", "paths"), MIXERS)
def test_no_rate_makes_a_second_reading_worse(mixer: str, paths: str, rate: float, steps: int) -> None:
    check(tiny(mixer, (FAST, PLAIN)), paths, rate, steps, slack=0.005 if mixer == "linear" else 0.0)


@pytest.mark.thorough
@pytest.mark.parametrize("layers", [(1,), (0, 1, 2, 3)])
@pytest.mark.parametrize("steps", [1, 8])
@pytest.mark.parametrize("rate", RATES)
def test_no_rate_makes_a_pretrained_model_worse(layers: tuple[int, ...], rate: float, steps: int) -> None:
    transformers = pytest.importorskip("transformers")
    from nested_learning.models.pretrained import levels_from_pretrained

    torch.manual_seed(0)
    sizes = {"vocab_size": 13, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    hf = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**sizes, **heads))
    with torch.no_grad():
        for p in hf.parameters():
            p.add_(0.2 * torch.randn_like(p))
    check(levels_from_pretrained(hf, [LevelSpec(name="a", chunk_size=8, layers=layers)]), "cms", rate, steps)


def test_the_table_of_second_readings_is_that_of_reading_by_hand() -> None:
    transformers = pytest.importorskip("transformers")
    from nested_learning.eval.second_reading import second_readings, table
    from nested_learning.models.pretrained import levels_from_pretrained

    torch.manual_seed(0)
    sizes = {"vocab_size": 13, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
    hf = transformers.AutoModelForCausalLM.from_config(transformers.GPT2Config(**sizes)).eval()
    other = text(2, 25, seed=5)
    rows = list(second_readings(hf, TEXT, other, [(0,), (0, 1)], [1.0], [2], chunk_size=8))
    assert [row[:3] for row in rows] == [("none", 0.0, 0), ("0", 1.0, 2), ("0,1", 1.0, 2)]
    model = levels_from_pretrained(hf, [LevelSpec(name="fast", chunk_size=8, layers=(0, 1))])
    _, state = memorize(model, TEXT, config=AdaptConfig(chunk_size=8, lr=1.0, steps=2))
    memory = restart(model, state)
    expected = [score(model, tokens, m)[0].mean() for m in (None, memory) for tokens in (TEXT, other)]
    torch.testing.assert_close(torch.tensor(rows[2][3:]), torch.stack(expected), rtol=1e-5, atol=1e-6)
    assert rows[2][5] < rows[0][3]
    cells = [cell.strip() for cell in table(rows).splitlines()[4].split("|")]
    assert cells[1:5] == ["0,1", "1", "2", f"{rows[2][3]:.3f}"]


@pytest.mark.parametrize("rate", RATES)
def test_a_write_never_raises_the_loss_of_its_chunk(rate: float) -> None:
    """One chunk from the start: reading it again in the same place is what the write was judged by."""
    model = tiny("attention", (PLAIN,))
    before, _ = score(model, TEXT)
    report, state = memorize(model, TEXT, config=AdaptConfig(chunk_size=24, lr=rate))
    after, _ = score(model, TEXT, restart(model, state))
    fell = before.mean(1) - after.mean(1)
    assert (fell[report.wrote[:, 0]] > 0).all()
    assert (fell[~report.wrote[:, 0]] == 0).all()


def test_a_step_is_cut_to_a_relative_change_of_all_weights_together() -> None:
    """Against a gradient taken by hand; the rate would take the weights 10,000 times farther."""
    model = tiny("attention", (PLAIN,))
    start = model.init_state(2, plain=True).detach()
    names = fast_paths(model, start)["cms_plain"]
    weights = {name: start.named_tensors()[name].clone().requires_grad_() for name in names}
    logits, _ = model(TEXT[:, :-1], start.replace(weights))
    losses = torch.nn.functional.cross_entropy(logits.mT, TEXT[:, 1:], reduction="none").mean(1)
    slopes = torch.autograd.grad(losses.sum(), list(weights.values()))
    _, state = memorize(model, TEXT, start, AdaptConfig(chunk_size=24, lr=1e5))
    moved = [state.named_tensors()[name] - start.named_tensors()[name] for name in names]
    for row in range(2):
        pairs = zip(slopes, weights.values(), strict=True)
        reach = sum(float(s[row].norm() / w[row].detach().norm()) for s, w in pairs)
        shares = {
            round(float(-(m[row] * s[row]).sum() / s[row].square().sum()) * reach / STEP, 9)
            for m, s in zip(moved, slopes, strict=True)
        }
        assert len(shares) == 1 and shares <= {1.0, 0.125, 0.015625, 0.0}


@pytest.mark.parametrize("through", [False, True])
def test_training_with_any_rate_has_finite_gradients(through: bool) -> None:
    model = tiny("attention", (PLAIN,))
    config = AdaptConfig(chunk_size=8, lr=1e6, steps=2)
    loss = online_loss(model, TEXT, config, through)
    torch.testing.assert_close(
        loss, memorize(model, TEXT, config=config)[0].losses.mean(), rtol=1e-10, atol=0
    )
    loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", ["lr", "threshold", "steps", "chunk_size"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -1, True, "1", None])
def test_values_that_are_no_setting_are_refused_by_name(name: str, value: object) -> None:
    values = {"surprise": "l2", name: value}
    with pytest.raises(ValueError, match=f"^adapt.{name} must be "):
        AdaptConfig(**values)
