"""The wrapper of titans-pytorch: the sizes that the comparison promises."""

import pytest
import torch

from nested_learning.bench.settings import build_model, hope_config, peer_comparison, smoke_settings
from nested_learning.bench.steps import training_step

pytest.importorskip("titans_pytorch")


@pytest.mark.parametrize("expansion", [1, 4])
def test_memory_has_two_layers_of_the_promised_width(expansion: int):
    settings = smoke_settings()
    cases = peer_comparison(8, expansion)
    assert [case.expansion for case in cases] == ([1, 1] if expansion == 1 else [4, 4, 1])
    model = build_model(settings, cases[0])
    width = settings.dim // settings.heads
    memory = model.blocks[0].mixer
    assert [tuple(w.shape) for w in memory.memory_model.model.weights] == [
        (width, expansion * width),
        (expansion * width, width),
    ]
    assert (memory.heads, memory.store_chunk_size, memory.retrieve_chunk_size) == (settings.heads, 8, 8)


def test_ours_has_the_same_hidden_width():
    peer, ours, own = (hope_config(smoke_settings(), case) for case in peer_comparison(8, 4))
    assert [peer.memory.hidden, ours.memory.hidden, own.memory.hidden] == [64, 64, 16]


def test_both_models_have_the_same_block_around_the_mixer():
    settings = smoke_settings()
    peer, ours = (build_model(settings, case) for case in peer_comparison(8))

    def outside(model: torch.nn.Module) -> int:
        return sum(p.numel() for name, p in model.named_parameters() if ".mixer." not in name)

    assert outside(peer) == outside(ours)


def test_the_past_does_not_see_the_future():
    settings = smoke_settings()
    model = build_model(settings, peer_comparison(8)[0])
    tokens = torch.arange(32)[None] % settings.vocab
    changed = tokens.clone()
    changed[:, 24:] = 0
    with torch.no_grad():
        before, after = model(tokens)[0], model(changed)[0]
    torch.testing.assert_close(before[:, :24], after[:, :24])
    assert (before[:, 25:] != after[:, 25:]).any()


def test_an_optimizer_can_step_it():
    settings = smoke_settings()
    settings.optimizer = True
    model = build_model(settings, peer_comparison(8)[0])
    before = [p.detach().clone() for p in model.blocks[0].mixer.memory_model_parameters]
    training_step(model, settings, batch=2, length=32)()
    after = model.blocks[0].mixer.memory_model_parameters
    assert all((p != b).any() for p, b in zip(after, before, strict=True))
