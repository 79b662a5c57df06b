"""The recall task against a reader that keeps a dictionary."""

from collections import Counter

import pytest
import torch

from nested_learning.data.synthetic import recall_batch


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("pairs", "vocab"), [(8, 64), (1, 2), (4, 8), (3, 11)])
def test_a_dictionary_answers_every_query(pairs, vocab):
    tokens, targets = recall_batch(32, pairs, vocab, generator())
    assert tokens.shape == targets.shape == (32, 4 * pairs)
    for row, target in zip(tokens.tolist(), targets.tolist(), strict=True):
        stated, asked = row[: 2 * pairs], row[2 * pairs :]
        memory = dict(zip(stated[::2], stated[1::2], strict=True))
        assert len(memory) == pairs and sorted(asked[::2]) == sorted(memory)
        assert all(0 <= key < vocab // 2 <= value < vocab for key, value in memory.items())
        expected = [-100] * (2 * pairs)
        for position in range(0, 2 * pairs, 2):
            assert asked[position + 1] == memory[asked[position]]
            expected += [memory[asked[position]], -100]
        assert target == expected


def test_target_is_the_next_token():
    tokens, targets = recall_batch(16, generator=generator())
    asked = targets[:, :-1] != -100
    assert asked.sum() == 16 * 8
    assert torch.equal(targets[:, :-1][asked], tokens[:, 1:][asked])


def test_same_generator_same_batch():
    first, again, other = (recall_batch(4, generator=generator(seed))[0] for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_keys_values_and_order_are_uniform():
    tokens, _ = recall_batch(6000, num_pairs=2, vocab_size=8, generator=generator())
    for position, low in ((0, 0), (1, 4), (2, 0), (3, 4)):  # k1 v1 k2 v2: four equally likely ids each
        counts = Counter(tokens[:, position].tolist())
        assert set(counts) == set(range(low, low + 4))
        assert all(abs(count - 1500) < 170 for count in counts.values())  # 5 standard deviations
    first_asked_first = (tokens[:, 4] == tokens[:, 0]).sum().item()
    assert abs(first_asked_first - 3000) < 195


@pytest.mark.parametrize("pairs", [0, 5])
def test_too_many_pairs_for_the_keys(pairs):
    with pytest.raises(ValueError, match=f"num_pairs={pairs} must lie between 1 and vocab_size // 2 = 4"):
        recall_batch(2, num_pairs=pairs, vocab_size=8)


def read(row, pairs, overwritten, later=True):
    """Answers of a dictionary that takes the later value of a key, or the first one."""
    stated, asked = row[: 2 * (pairs + overwritten)], row[2 * (pairs + overwritten) :]
    memory = {}
    for key, value in zip(stated[::2], stated[1::2], strict=True):
        if later or key not in memory:
            memory[key] = value
    return [memory[key] for key in asked[::2]]


@pytest.mark.parametrize(("pairs", "overwritten"), [(8, 4), (8, 8), (3, 1), (8, 0)])
def test_the_later_value_of_a_key_counts(pairs, overwritten):
    tokens, targets = recall_batch(64, pairs, 64, generator(), overwritten)
    start = 2 * (pairs + overwritten)
    assert tokens.shape == targets.shape == (64, start + 2 * pairs)
    wrong = 0
    for row, target in zip(tokens.tolist(), targets.tolist(), strict=True):
        assert target[start::2] == read(row, pairs, overwritten) == row[start + 1 :: 2]
        assert target[:start] + target[start + 1 :: 2] == [-100] * (start + pairs)
        assert sorted(Counter(row[:start:2]).values()) == [1] * (pairs - overwritten) + [2] * overwritten
        stale = read(row, pairs, overwritten, later=False)
        wrong += sum(a != b for a, b in zip(stale, target[start::2], strict=True))
    assert wrong == 64 * overwritten  # a reader that keeps first values is wrong at all of them


def test_overwriting_statements_are_anywhere_and_their_values_uniform():
    tokens, _ = recall_batch(6000, 2, 8, generator(), overwritten=1)
    again = Counter()
    values = Counter()
    for row in tokens.tolist():
        keys = row[:6:2]
        twice = next(key for key in keys if keys.count(key) == 2)
        first, second = (i for i in range(3) if keys[i] == twice)
        again[first, second] += 1
        values[(row[2 * second + 1] - row[2 * first + 1]) % 4] += 1
    assert set(again) == {(0, 1), (0, 2), (1, 2)} and set(values) == {1, 2, 3}
    assert all(abs(count - 2000) < 185 for count in (*again.values(), *values.values()))


def test_overwritten_keys_that_cannot_be():
    with pytest.raises(ValueError, match="overwritten=3 must lie between 0 and num_pairs = 2"):
        recall_batch(2, num_pairs=2, vocab_size=8, overwritten=3)
    with pytest.raises(ValueError, match="vocab_size=2 has no second value"):
        recall_batch(2, num_pairs=1, vocab_size=2, overwritten=1)
