"""Passkeys: how prompts are built, an oracle, and a random model."""

import random
import re
from dataclasses import dataclass, replace

import pytest

from nested_learning.eval import haystack
from nested_learning.eval.arms import Memorize
from nested_learning.eval.evaluation import evaluate
from nested_learning.eval.haystack import Grid
from nested_learning.eval.loading import Loaded
from nested_learning.eval.passkey import Passkey, passkey_prompt

GRID = Grid(
    tasks=("passkey",), context_lengths=(450, 600), samples_per_length=2, depths=3, seed=0, max_new_tokens=8
)
FACT = re.compile(r"The pass key is (\d{5})\. Remember it\. (\d{5}) is the pass key\.")


@pytest.mark.parametrize("depth", [0.0, 0.25, 1.0])
def test_one_passkey_at_its_depth(depth: float) -> None:
    sample = passkey_prompt(40, depth, random.Random(3))
    ((first, second),) = FACT.findall(sample.prompt)
    assert (first,) == (second,) == sample.answers
    lines = sample.prompt.splitlines()[1:-1]
    assert len(lines) == 41 and FACT.fullmatch(lines[round(40 * depth)])
    assert sample.depths == (depth,)
    assert sample.prompt.endswith("\nWhat is the pass key? The pass key is")


@dataclass
class Oracle:
    loaded: Loaded
    memorize: Memorize | None
    max_new_tokens: int

    def answer(self, prompt: str, right: str) -> dict[str, str]:
        assert len(prompt) <= 600 - self.max_new_tokens
        return {"baseline": f" {FACT.findall(prompt)[0][0]}."}


def test_an_oracle_is_always_right_and_a_model_that_knows_nothing_never(
    loaded, tmp_path, monkeypatch
) -> None:
    random_model = evaluate(Passkey(loaded, GRID), tmp_path / "p.json")
    assert [(m.task, m.value) for m in random_model.metrics] == [
        ("passkey at 450", 0.0),
        ("passkey at 600", 0.0),
    ]
    monkeypatch.setattr(haystack, "Answerer", Oracle)
    oracle = evaluate(Passkey(loaded, GRID), tmp_path / "o.json")
    assert [m.value for m in oracle.metrics] == [1.0, 1.0]


def test_input_that_is_not_allowed(loaded) -> None:
    with pytest.raises(ValueError, match="tasks must be passkey, got s1"):
        Passkey(loaded, replace(GRID, tasks=("s1",)))
