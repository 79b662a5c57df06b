"""Against the Hugging Face models themselves, built at random from their configurations."""

import copy
import re
from dataclasses import replace

import pytest
import torch
from tolerances import assert_same
from torch import nn
from torch.nn import functional as F

from nested_learning.adapt import AdaptConfig, checksum, diff, memorize, restart, score
from nested_learning.levels import LevelSpec
from nested_learning.models.pretrained import PretrainedLevels, levels_from_pretrained
from nested_learning.state import load_state

transformers = pytest.importorskip("transformers")

SMALL = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
SPECIAL = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
WINDOW = {"sliding_window": 6}
FAMILIES = {
    "llama": lambda: transformers.LlamaConfig(**SMALL, **HEADS, **SPECIAL, mlp_bias=True),
    "qwen2": lambda: transformers.Qwen2Config(**SMALL, **HEADS, **SPECIAL),
    "qwen3": lambda: transformers.Qwen3Config(**SMALL, **HEADS, **SPECIAL, head_dim=8),
    "gemma": lambda: transformers.GemmaConfig(**SMALL, **HEADS, **SPECIAL, head_dim=8),
    "gemma3": lambda: transformers.Gemma3TextConfig(**SMALL, **HEADS, **SPECIAL, **WINDOW, head_dim=8),
    "mistral": lambda: transformers.MistralConfig(**SMALL, **HEADS, **SPECIAL, **WINDOW),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=50, n_embd=32, n_layer=3, n_head=4, n_positions=80),
}
LEVELS = (
    LevelSpec(name="fast", chunk_size=8, layers=(1,)),
    LevelSpec(name="slow", chunk_size=16, layers=(2,)),
)
LENGTH = 3 * (32 + 48)  # operations in a row: layers, width; in float32, which the models are in
ADAPT = AdaptConfig(chunk_size=8, lr=3.0)


pytestmark = pytest.mark.usefixtures("one_thread")  # models this small are slower on several


def network(family):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(FAMILIES[family]()).eval()
    with torch.no_grad():  # larger than at the start of training, so that every block matters
        for name, p in model.named_parameters():
            if ".mlp." in name:
                p.normal_(std=0.2)
    return model


def text(length=49, rows=2):
    return torch.randint(50, (rows, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", FAMILIES)
def test_without_adaptation_the_logits_are_those_of_the_original(family):
    hf, tokens = network(family), text()
    model = levels_from_pretrained(hf, LEVELS)
    with torch.no_grad():
        expected = hf(tokens).logits
        assert torch.equal(model(tokens)[0], expected)
        rowwise, _ = model(tokens, model.init_state(2, plain=True))
        assert_same(rowwise, expected, LENGTH, factor=1)
    report, _ = memorize(model, tokens, config=AdaptConfig(chunk_size=48, lr=0.0))
    assert not report.wrote.any()
    losses = F.cross_entropy(expected[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    assert_same(report.losses.flatten(), losses, LENGTH, factor=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_any_split_of_the_text_gives_the_same_logits(family):
    model, tokens = levels_from_pretrained(network(family), LEVELS), text(20)
    with torch.no_grad():
        whole, _ = model(tokens, model.init_state(2, plain=True))
        state, parts = model.init_state(2, plain=True), []
        for part in tokens.split([7, 1, 12], 1):
            logits, state = model(part, state)
            parts.append(logits)
    assert_same(torch.cat(parts, 1), whole, LENGTH, factor=1)
    assert state.position == 20


def naive_losses(hf, row, chunk, periods, lr):
    """One row: gradient steps on a copy's own parameters. Changes wait until their layer's period is over."""
    hf, cache, losses, waiting = copy.deepcopy(hf), transformers.DynamicCache(), [], {}
    inputs, targets = row[None, :-1].split(chunk, 1), row[None, 1:].split(chunk, 1)
    for number, (x, y) in enumerate(zip(inputs, targets, strict=True), 1):
        logits = hf(x, past_key_values=cache).logits
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys.detach(), layer.values.detach()
        each = F.cross_entropy(logits[0], y[0], reduction="none")
        losses.append(each.detach())
        for name, p in hf.named_parameters():
            found = re.search(r"\.(\d+)\.mlp\..*weight$", name)
            if found and int(found.group(1)) in periods:
                (g,) = torch.autograd.grad(each.mean(), p, retain_graph=True)
                waiting[name] = waiting.get(name, 0) - lr * g
                if number * chunk % periods[int(found.group(1))] == 0:
                    p.data += waiting.pop(name)
    return torch.cat(losses)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_adaptation_equals_gradient_steps_on_copies_of_the_model(family):
    """Every row learns by itself; layer 1 after 8 tokens, layer 2 after 16, from the sum of its gradients."""
    hf, tokens = network(family), text()
    model = levels_from_pretrained(hf, LEVELS)
    before = checksum(model)
    report, state = memorize(model, tokens, config=AdaptConfig(chunk_size=8, lr=0.3))
    assert checksum(model) == before
    expected = torch.stack([naive_losses(hf, row, 8, {1: 8, 2: 16}, 0.3) for row in tokens])
    torch.testing.assert_close(report.losses, expected, rtol=1e-4, atol=1e-4)
    plain, _ = score(model, tokens)
    assert (report.losses - plain).abs().max() > 0.01  # what was learned matters
    assert (diff(model, model.init_state(2, plain=True), state)["cms_plain"]["mlps.0"] > 0).all()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_perplexity_falls_on_a_second_reading_and_only_there(family):
    model, tokens = levels_from_pretrained(network(family), LEVELS), text()
    first, _ = score(model, tokens)
    _, state = memorize(model, tokens, config=ADAPT)
    again, _ = score(model, tokens, restart(model, state))  # a new context: nothing is left but the weights
    assert again.mean().exp() < 0.9 * first.mean().exp()
    assert torch.equal(score(model, tokens)[0], first)
    other, _ = score(model, text(), restart(model, state.rows(torch.tensor([1, 0]))))
    assert (other.mean(1) > again.mean(1)).all()  # a row knows its own text better than another's


def test_a_state_is_not_changed_by_reading_on_from_it():
    model, tokens = levels_from_pretrained(network("llama"), LEVELS), text(20)
    _, state = memorize(model, tokens, config=ADAPT)
    copies = [t.clone() for t in state.tensors()]
    first, second = (model(tokens, state)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert all(torch.equal(a, b) for a, b in zip(state.tensors(), copies, strict=True))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_generation_is_that_of_the_original_and_changes_with_what_was_learned(family):
    hf, prompt = network(family), text(9, rows=1)
    model = levels_from_pretrained(hf, LEVELS)
    greedy = hf.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=-1, pad_token_id=0)
    assert torch.equal(model.generate(prompt, 12, temperature=0), greedy)
    passage = torch.arange(25)[None] % 5 + 20
    state = None
    for _ in range(8):
        _, learned = memorize(model, passage, state, AdaptConfig(chunk_size=8, lr=1.0))
        state = restart(model, learned)
    written = model.generate(passage[:, :5], 10, state, temperature=0)
    assert torch.equal(written, torch.arange(15)[None] % 5 + 20)
    a, b = (model.generate(prompt, 12, state, top_k=20, seed=3) for _ in range(2))
    assert torch.equal(a, b)


def test_saving_and_loading(tmp_path):
    model, tokens = levels_from_pretrained(network("qwen2"), LEVELS), text(20)
    _, state = memorize(model, tokens, config=ADAPT)
    model.save(tmp_path / "model")
    state.save(tmp_path / "memory.pt")
    other, memory = PretrainedLevels.load(tmp_path / "model"), load_state(tmp_path / "memory.pt")
    assert list(other.levels) == list(model.levels)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        assert torch.equal(other(tokens, memory)[0], model(tokens, state)[0])
        assert torch.equal(plain(tokens).logits, model(tokens)[0])
    with pytest.raises(FileNotFoundError, match="levels.json"):
        PretrainedLevels.load(tmp_path)


def test_bfloat16_weights_learn_in_float32():
    model, tokens = levels_from_pretrained(network("llama").bfloat16(), LEVELS), text()
    report, state = memorize(model, tokens, config=ADAPT)
    assert {t.dtype for mlp in state.mlps for t in mlp.weights} == {torch.float32}
    again, _ = score(model, tokens, restart(model, state))
    assert again.mean() < report.losses.mean() - 0.1


def mixture():
    config = transformers.Qwen2MoeConfig(**SMALL, **HEADS, num_experts=2, moe_intermediate_size=8)
    return transformers.Qwen2MoeForCausalLM(config)


def spec(name="a", **values):
    return LevelSpec(name=name, chunk_size=8, **values)


@pytest.mark.parametrize(
    "act, message",
    [
        (
            lambda m: levels_from_pretrained(nn.Linear(2, 2), [spec()]),
            "Linear has no MLP blocks called layers.N.mlp",
        ),
        (lambda m: levels_from_pretrained(mixture(), [spec()]), "Qwen2MoeForCausalLM has experts in layer 0"),
        (lambda m: levels_from_pretrained(m, []), "levels must hold at least one level"),
        (
            lambda m: levels_from_pretrained(m, [spec(), spec("b")]),
            "levels.a.layers must say which of the 3 layers",
        ),
        (lambda m: levels_from_pretrained(m, [spec(layers=(3,))]), "levels.a.layers must be below 3, got 3"),
        (
            lambda m: levels_from_pretrained(m, [spec(layers=(1,)), spec("b", layers=(0, 1))]),
            "layer 1 must be at one level only, not at b too",
        ),
        (
            lambda m: levels_from_pretrained(m, [spec(layers=(1,)), spec(layers=(0,))]),
            "levels must have different names, got ['a', 'a']",
        ),
        (
            lambda m: levels_from_pretrained(m, [spec(expansion=2.0)]),
            "levels.a may set name, chunk_size and layers",
        ),
        (
            lambda m: PretrainedLevels(m, LEVELS)(torch.zeros(2, 0, dtype=torch.int64)),
            "of at least 1, got [2, 0]",
        ),
        (
            lambda m: PretrainedLevels(m, LEVELS)(
                text(4), PretrainedLevels(m, LEVELS).init_state(3, plain=True)
            ),
            "PretrainedLevels state must have the batch of x, 2, got 3",
        ),
        (
            lambda m: PretrainedLevels(m, LEVELS)(
                text(4), PretrainedLevels(m, LEVELS[:1]).init_state(2, plain=True)
            ),
            "state must hold the weights of 2 MLP blocks or none, got 1",
        ),
        (
            lambda m: PretrainedLevels(m, LEVELS).generate(text(4), -1),
            "max_new_tokens must be an integer of at least 0, got -1",
        ),
    ],
)
def test_errors(act, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        act(network("llama"))


def test_levels_without_a_period_and_layers_without_a_level_do_not_adapt():
    levels = [LevelSpec(name="still", layers=(0,)), spec(layers=(2,))]
    model = levels_from_pretrained(network("gpt2"), levels)
    weights = model.init_state(1, plain=True).mlps
    assert [tuple(w.shape) for w in weights[0].weights] == [(1, 32, 128), (1, 128, 32)]
    assert len(weights) == 1
    assert len(levels_from_pretrained(network("gpt2"), [spec()]).init_state(1, plain=True).mlps) == 3


@pytest.mark.parametrize(
    ("act", "kind", "message"),
    [
        (lambda m, s: m([[1, 2], [3]]), TypeError, "tokens must be a tensor [batch, length], got list"),
        (lambda m, s: m(text(4).float()), TypeError, "tokens must be int64 or int32, got torch.float32"),
        (lambda m, s: m(text(4)[0]), ValueError, "of at least 1, got [4]"),
        (lambda m, s: m(torch.tensor([[3, 50]])), ValueError, "tokens must be from 0 to 49, got 50"),
        (lambda m, s: m.generate([[1, 2], [3]], 2), TypeError, "tokens must be a tensor [batch, length]"),
        (lambda m, s: m.generate(torch.tensor([[-1]]), 2), ValueError, "tokens must be from 0 to 49, got -1"),
        (
            lambda m, s: m.generate(text(4), 2.0),
            ValueError,
            "max_new_tokens must be an integer of at least 0",
        ),
        (lambda m, s: m.generate(text(4), 2, seed="a"), ValueError, "seed must be an integer of 64 bits"),
        (lambda m, s: m(text(4), s.mlps[0]), ValueError, "takes a PretrainedState as state, got Pretrained"),
        (lambda m, s: m(text(4), replace(s, cache=s.cache[:2])), ValueError, "of 3 decoder layers, got 2"),
        (lambda m, s: m(text(4), s.to("meta")), ValueError, "must be on the device of x, cpu, got meta"),
        (
            lambda m, s: PretrainedLevels(m.model, (LEVELS[0], replace(LEVELS[1], chunk_size=32)))(
                text(4), s
            ),
            ValueError,
            "state must be of chunk size 32, got 16",
        ),
        (
            lambda m, s: PretrainedLevels(network("gpt2"), LEVELS)(text(4), s),
            ValueError,
            "state must hold 2 matrices of a block, got 3",
        ),
        (lambda m, s: levels_from_pretrained(m.model, [{"name": "a"}]), ValueError, "must hold LevelSpec"),
    ],
)
def test_other_tokens_and_states_are_refused(act, kind, message):
    model = PretrainedLevels(network("llama"), LEVELS)
    with torch.no_grad():
        _, state = model(text(4), model.init_state(2, plain=True))
        with pytest.raises(kind, match=re.escape(message)):
            act(model, state)
        assert model(text(4), state)[1].position == 8


def test_damaged_levels_are_named(tmp_path):
    for content in ("[", '[{"nam": "a"}]', "[3]"):
        (tmp_path / "levels.json").write_text(content)
        with pytest.raises(ValueError, match=r"levels\.json does not hold levels: "):
            PretrainedLevels.load(tmp_path)
