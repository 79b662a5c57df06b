"""The `--memorize` options, and what a state has learned after `Memorize.read`."""

import argparse
from dataclasses import replace

import pytest
import torch

from nested_learning.adapt import AdaptConfig, checksum, memorize, score
from nested_learning.commands.evaluation.options import add_memorize_options, memorize_from
from nested_learning.eval.arms import Memorize, Memorizer

FORGETTING = AdaptConfig(lr=0.5)


def parse(*arguments):
    parser = argparse.ArgumentParser()
    add_memorize_options(parser)
    return memorize_from(parser.parse_args(arguments))


@pytest.fixture
def tokens():
    return torch.tensor([list(b"The quick brown fox jumps over the lazy dog. ")])


def test_options_become_a_configuration():
    assert parse() is None
    assert parse("--memorize") == Memorize()
    made = parse(
        *("--memorize", "--memorize-steps", "3", "--memorize-lr", "0.5", "--memorize-paths", "cms_fast"),
        *("--memorize-surprise-threshold", "0.2", "--memorize-no-reset", "--memorize-use-correct-answer"),
    )
    adapt = AdaptConfig(steps=3, lr=0.5, paths="cms_fast", surprise="l2", threshold=0.2, reset=False)
    assert made == Memorize(adapt=adapt, use_correct_answer=True)
    assert made.arm == "adapted, gold text"
    assert Memorize().arm == "adapted"


def test_options_without_memorize_are_refused():
    with pytest.raises(ValueError, match="--memorize-no-reset needs --memorize"):
        parse("--memorize-no-reset")
    with pytest.raises(ValueError, match="--memorize-steps needs --memorize"):
        parse("--memorize-steps", "0")


def test_read_is_memorize_and_one_more_token(loaded, tokens):
    how = Memorize(adapt=AdaptConfig(lr=0.5, chunk_size=8))
    after = how.read(loaded.model, tokens)
    _, before = memorize(loaded.model, tokens, config=how.adapt)
    _, expected = loaded.model(tokens[:, -1:], before)
    assert after.position == tokens.shape[1]
    for name, tensor in expected.named_tensors().items():
        assert torch.equal(tensor, after.named_tensors()[name]), name


def test_memory_lowers_the_loss_of_what_was_read_and_leaves_the_model(loaded, tokens):
    before = checksum(loaded.model)
    how = Memorize(adapt=AdaptConfig(lr=0.5, chunk_size=8, steps=2))
    memory = how.memory(loaded.model, how.read(loaded.model, tokens))
    first, second = score(loaded.model, tokens)[0], score(loaded.model, tokens, memory)[0]
    assert memory.position == 0
    assert second.mean() < first.mean() - 0.1
    assert checksum(loaded.model) == before


def test_without_a_learning_rate_memory_is_the_plain_model(loaded, tokens):
    how = Memorize(adapt=AdaptConfig(lr=0.0))
    state = how.read(loaded.model, tokens)
    plain = loaded.model(tokens)[1]
    torch.testing.assert_close(state.named_tensors(), plain.named_tensors(), atol=1e-5, rtol=1e-5)


def test_what_is_carried_depends_on_reset(loaded, tokens):
    how = Memorize(adapt=AdaptConfig(lr=0.5, reset=False))
    kept, forgotten = Memorizer(loaded.model, how), Memorizer(loaded.model, replace(how, adapt=FORGETTING))
    first, second = ([one.read(tokens).named_tensors() for _ in range(2)] for one in (kept, forgotten))
    assert all(torch.equal(second[0][name], second[1][name]) for name in second[0])
    assert not all(torch.equal(first[0][name], first[1][name]) for name in first[0])
    assert all(torch.equal(first[0][name], second[0][name]) for name in first[0])
    memory = how.memory(loaded.model, how.read(loaded.model, tokens))
    again = how.read(loaded.model, tokens, memory)
    assert again.position == tokens.shape[1]  # a new context
    for name, tensor in again.named_tensors().items():
        assert torch.equal(tensor, first[1][name]), name
