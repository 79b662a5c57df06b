"""The MAD tasks against solvers that read only the tokens, and against their definitions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from nested_learning.data.padding import IGNORE
from nested_learning.data.synthetic.mad import TASKS, MadSettings, memorized_table

Answers = list[int | None]


def rows(name: str, count: int = 64, seed: int = 0, **changes: float) -> list[tuple[list[int], list[int]]]:
    task = TASKS[name]
    settings = replace(task.settings, **changes)  # type: ignore[arg-type]
    tokens, targets = task.draw(count, torch.Generator().manual_seed(seed), settings)
    assert tokens.shape == targets.shape == (count, settings.length)
    assert tokens.dtype == targets.dtype == torch.int64
    assert set(tokens.flatten().tolist()) <= set(range(settings.vocab_size))
    return list(zip(tokens.tolist(), targets.tolist(), strict=True))


def solve_recall(tokens: list[int]) -> Answers:
    """At a key that was there before: the token that followed it then."""
    after: dict[int, int] = {}
    answers: Answers = []
    for t, token in enumerate(tokens):
        answers.append(after.get(token) if token < 8 else None)
        if t and tokens[t - 1] < 8:
            after[tokens[t - 1]] = token
    return answers


def solve_fuzzy(tokens: list[int]) -> Answers:
    """Splits tokens where values end; a value is known from an equal key before, up to where it ended."""
    known: dict[tuple[int, ...], tuple[int, ...]] = {}
    answers: Answers = []
    key: tuple[int, ...] = ()
    value: tuple[int, ...] = ()
    for token in tokens:
        if token < 7:
            if value:
                known.setdefault(key, value)
                key, value = (), ()
            key += (token,)
        elif token < 15:
            value += (token,)
        expected = known.get(key, ())
        answers.append(expected[len(value)] if key and len(value) < len(expected) else None)
    return answers


def solve_copying(tokens: list[int]) -> Answers:
    """After the copy token: the tokens that are neither blank nor copy, in order."""
    place = tokens.index(15)
    return [None] * (place + 1) + [token for token in tokens[:place] if token != 14]


def solve_memorization(tokens: list[int]) -> Answers:
    """With the table that another batch tells."""
    table = {
        row[t - 1]: target
        for row, targets in rows("memorization", 800, seed=99)
        for t, target in enumerate(targets)
        if target != IGNORE
    }
    return [table[tokens[t - 1]] if token == 1023 else None for t, token in enumerate(tokens)]


def solve_compression(tokens: list[int]) -> Answers:
    return [token if token < 15 else None for token in tokens]


SOLVERS: dict[str, Callable[[list[int]], Answers]] = {
    "compression": solve_compression,
    "recall": solve_recall,
    "fuzzy": solve_fuzzy,
    "noisy": solve_recall,
    "copying": solve_copying,
    "memorization": solve_memorization,
}


@pytest.mark.parametrize("name", list(TASKS))
def test_a_solver_that_reads_the_tokens_answers_all_that_is_asked(name: str) -> None:
    asked = 0
    for tokens, targets in rows(name):
        answers = SOLVERS[name](tokens)
        for answer, target in zip(answers, targets, strict=True):
            assert target in (IGNORE, answer)
            asked += target != IGNORE
    assert asked > 64


@pytest.mark.parametrize("name", ["recall", "noisy", "copying", "memorization", "compression"])
def test_everything_that_can_be_known_is_asked(name: str) -> None:
    for tokens, targets in rows(name):
        assert targets == [IGNORE if answer is None else answer for answer in SOLVERS[name](tokens)]


@pytest.mark.parametrize("name", list(TASKS))
def test_same_generator_same_sequences(name: str) -> None:
    assert rows(name, 4, seed=1) == rows(name, 4, seed=1) != rows(name, 4, seed=2)


@pytest.mark.parametrize("name", list(TASKS))
def test_chance_is_what_the_commonest_answer_gets(name: str) -> None:
    count = 3000 if name == "memorization" else 400
    answers = Counter(t for _, targets in rows(name, count) for t in targets if t != IGNORE)
    assert answers.most_common(1)[0][1] / answers.total() < 1.5 * TASKS[name].chance
    assert len(answers) == round(1 / TASKS[name].chance)


def test_recall_alternates_keys_and_values_and_keeps_its_table() -> None:
    for tokens, _ in rows("recall"):
        pairs = list(zip(tokens[::2], tokens[1::2], strict=True))
        assert all(key < 8 <= value < 16 for key, value in pairs)
        assert len(set(pairs)) == len({key for key, _ in pairs})
    tables = {tuple(sorted(set(zip(t[::2], t[1::2], strict=True)))) for t, _ in rows("recall")}
    assert len(tables) == 64  # of every sequence its own


def test_a_share_of_pairs_is_noise() -> None:
    drawn = rows("noisy", 200)
    noise = sum(token >= 16 for tokens, _ in drawn for token in tokens[::2])
    assert abs(noise / (200 * 24) - 0.2) < 0.03  # 5 standard deviations
    for tokens, targets in drawn:
        assert [token < 16 for token in tokens[::2]] == [token < 16 for token in tokens[1::2]]
        assert all(b == IGNORE for a, b in zip(tokens, targets, strict=True) if a >= 16)


def test_motifs_have_up_to_three_different_tokens_and_fill_from_the_left() -> None:
    sizes: Counter[int] = Counter()
    for tokens, _ in rows("fuzzy"):
        start = next(t for t, token in enumerate(tokens) if token != 15)
        body = tokens[start:]
        assert 15 not in body and start <= 6
        runs: list[list[int]] = [[]]
        for before, token in zip([body[0], *body], body, strict=False):
            if (before < 7) != (token < 7):
                runs.append([])
            runs[-1].append(token)
        assert all(len(set(run)) == len(run) <= 3 for run in runs)
        assert len({tuple(run) for run in runs[::2]}) <= 4
        sizes.update(len(run) for run in runs)
    assert set(sizes) == {1, 2, 3}


def test_copying_has_as_many_tokens_as_blanks_to_answer_at() -> None:
    for tokens, targets in rows("copying"):
        assert tokens[39] == 15 and tokens[40:] == [14] * 8 and tokens[:39].count(14) == 31
        assert targets[:40] == [IGNORE] * 40 and max(targets) < 14


def test_memorization_has_one_table_of_all_values() -> None:
    table = memorized_table(TASKS["memorization"].settings).tolist()
    assert sorted(table) == list(range(511, 1022)) and table != sorted(table)
    for tokens, targets in rows("memorization"):
        assert targets[1::2] == [table[key] for key in tokens[::2]] and set(tokens[1::2]) == {1023}


WRONG: list[tuple[str, dict[str, float], str]] = [
    ("recall", {"length": 7}, "length must be even, got 7"),
    ("recall", {"vocab_size": 3}, "vocab_size without noise_tokens must be at least 4, got 3"),
    ("noisy", {"noise_tokens": 0}, "noise_tokens must be at least 1 if there is noise"),
    ("fuzzy", {"vocab_size": 6}, "vocab_size must be at least 7"),
    ("fuzzy", {"motifs": 8}, "motifs must be at most 7, got 8"),
    ("fuzzy", {"length": 11}, "length must be at least 12"),
    ("copying", {"length": 16}, "length must be at least 17 to copy 8, got 16"),
    ("copying", {"vocab_size": 2}, "vocab_size must be at least 3, got 2"),
    ("memorization", {"length": 3}, "length must be even, got 3"),
    ("memorization", {"vocab_size": 4}, "vocab_size must be at least 5, got 4"),
    ("compression", {"vocab_size": 2}, "vocab_size must be at least 3, got 2"),
]


@pytest.mark.parametrize(("name", "changes", "message"), WRONG)
def test_sizes_that_cannot_be_are_refused(name: str, changes: dict[str, float], message: str) -> None:
    settings: MadSettings = replace(TASKS[name].settings, **changes)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        TASKS[name].draw(2, torch.Generator(), settings)
