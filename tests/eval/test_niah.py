"""RULER's tasks: how prompts are built, read by an independent parser; an oracle and a random model."""

import copy
import json
import random
import re
from dataclasses import dataclass, replace

import pytest
import torch

from nested_learning.data.tokenizer import ByteTokenizer
from nested_learning.eval import haystack
from nested_learning.eval.arms import Memorize
from nested_learning.eval.evaluation import evaluate
from nested_learning.eval.haystack import Filler, Grid, GridPoint, matches
from nested_learning.eval.loading import Loaded
from nested_learning.eval.niah import ADJECTIVES, NOUNS, TASKS, Niah, essay_words, needle_prompt

NEEDLE = re.compile(r"One of the special magic (\w+) for ([\w-]+) is: ([\w-]+)\.")
UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")
WORDS = essay_words()
EXPECTED = {  # needles in the prompt beside distractors, answers, kind of keys and values
    "s1": (1, 1, "words", "numbers"),
    "s2": (1, 1, "words", "numbers"),
    "s3": (1, 1, "words", "uuids"),
    "mk1": (4, 1, "words", "numbers"),
    "mk2": (1, 1, "words", "numbers"),
    "mk3": (1, 1, "uuids", "uuids"),
    "mv": (4, 4, "words", "numbers"),
    "mq": (4, 4, "words", "numbers"),
}


def parse(prompt: str) -> tuple[list[tuple[str, str]], list[str], str]:
    """Key and value of every needle in order, the keys asked for, and the context."""
    head, rest = prompt.split("\n", 1)
    context, question = rest.rsplit("\n", 1)
    needles = NEEDLE.findall(context)
    kinds = {kind for kind, _, _ in needles}
    assert len(kinds) == 1 and kinds.pop().rstrip("s") in head
    asked = re.search(
        r"What (?:are all|is) the special magic \w+ for (.*?) mentioned in the provided", question
    )
    assert asked is not None
    keys = re.split(r", (?:and )?", asked[1])
    return [(key, value) for _, key, value in needles], keys, context


def make(task: str, size: int = 600, depth: float | None = None, seed: int = 0):
    return needle_prompt(TASKS[task], WORDS, size, depth, random.Random(seed))


@pytest.mark.parametrize("task", TASKS)
def test_a_parser_finds_the_answers_that_are_claimed(task: str) -> None:
    count, answers, keys, values = EXPECTED[task]
    for seed in range(5):
        sample = make(task, seed=seed)
        pairs, asked, context = parse(sample.prompt)
        size = 600 if TASKS[task].haystack == "needle" else 0
        assert len(pairs) == count + size
        assert sorted(v for k, v in pairs if k in asked) == sorted(sample.answers)
        assert len(sample.answers) == answers == len(set(sample.answers))
        for key, value in pairs:
            assert UUID.fullmatch(key) if keys == "uuids" else set(key.split("-")) <= {*ADJECTIVES, *NOUNS}
            assert UUID.fullmatch(value) if values == "uuids" else re.fullmatch(r"[1-9]\d{6}", value)
        rest = NEEDLE.sub("", context).split()
        if TASKS[task].haystack == "essay":
            assert rest == WORDS[:600]
        elif TASKS[task].haystack == "noise":
            noise = (
                "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
            )
            assert rest == (noise + " ").split() * 600
        else:
            assert rest == []


def test_prompts_are_rulers() -> None:
    def outside(task: str, size: int) -> tuple[str, str, list[str]]:
        prompt = make(task, size).prompt
        _, asked, context = parse(prompt)
        head, question = prompt.split(f"\n{context}\n")
        return head, question, asked

    head, question, (key,) = outside("s1", 1)
    assert head == (
        "A special magic number is hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the number afterwards."
    )
    assert question == (
        f"What is the special magic number for {key} mentioned in the provided text? "
        f"The special magic number for {key} mentioned in the provided text is"
    )
    head, question, (a, b, c, d) = outside("mq", 4)
    assert head == (
        "Some special magic numbers are hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the numbers afterwards."
    )
    assert question == (
        f"What are all the special magic numbers for {a}, {b}, {c}, and {d} mentioned in the provided text? "
        f"The special magic numbers for {a}, {b}, {c}, and {d} mentioned in the provided text are"
    )


@pytest.mark.parametrize("task", TASKS)
def test_the_needle_asked_for_stands_at_its_depth(task: str) -> None:
    for depth in (0.0, 0.5, 1.0):
        sample = make(task, 2000, depth, seed=1)
        context = parse(sample.prompt)[2]
        place = context.index(sample.answers[0])
        assert abs(place / len(context) - depth) < 0.05
        assert sample.depths[0] == pytest.approx(depth, abs=0.02)
        for answer, at in zip(sample.answers, sample.depths, strict=True):
            assert abs(context.index(answer) / len(context) - at) < 0.05


def grid(**changes) -> Grid:
    values = {"tasks": ("s1",), "context_lengths": (1000,), "samples_per_length": 3, "depths": 3, "seed": 1}
    return Grid(**{**values, "max_new_tokens": 60, **changes})


@pytest.mark.parametrize("task", TASKS)
def test_prompts_fill_their_length_and_no_more(task: str) -> None:
    tokenizer = ByteTokenizer()
    longest = {"noise": 91, "essay": 20, "needle": 160}[TASKS[task].haystack]
    for length in (2000, 3100):
        filler = Filler(
            lambda name, size, depth, rng: needle_prompt(TASKS[name], WORDS, size, depth, rng),
            grid(tasks=(task,), context_lengths=(length,)),
            tokenizer,
        )
        for index in range(3):
            prompt = filler.fill(GridPoint(task, length, index)).prompt
            assert length - 60 - 2 * longest < len(prompt.encode()) <= length - 60
        second = filler.fill(GridPoint(task, length, 1))
        assert second == filler.fill(GridPoint(task, length, 1))
        assert second != filler.fill(GridPoint(task, length, 2))


@dataclass
class Oracle:
    """Answers from the prompt alone, by the parser of this file."""

    loaded: Loaded
    memorize: Memorize | None
    max_new_tokens: int

    def answer(self, prompt: str, right: str) -> dict[str, str]:
        pairs, asked, _ = parse(prompt)
        return {"baseline": "They are " + ", ".join(v.upper() for k, v in pairs if k in asked)}


def test_an_oracle_is_always_right(loaded, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(haystack, "Answerer", Oracle)
    every = grid(tasks=tuple(TASKS), context_lengths=(1200,))
    result = evaluate(Niah(loaded, every), tmp_path / "n.json")
    assert {metric.task for metric in result.metrics} == {f"{t} at 1200" for t in (*TASKS, "all tasks")}
    assert all(metric.value == 1.0 and metric.n in (3, 24) for metric in result.metrics)
    assert (tmp_path / "n.png").read_bytes().startswith(b"\x89PNG")


def test_a_model_that_knows_nothing_finds_nothing_and_resumes(loaded, tmp_path) -> None:
    """Chance level: no seven digits are guessed. A kill after two samples changes nothing of the result."""
    output, small = tmp_path / "n.json", grid(context_lengths=(600,), max_new_tokens=12)
    result = evaluate(Niah(loaded, small), output)
    assert [(m.value, m.low, m.chance) for m in result.metrics] == [(0.0, 0.0, 0.0)]
    first, log = output.read_bytes(), tmp_path / "n.samples.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(lines[:3]) + lines[3][:20])
    output.unlink()
    evaluate(Niah(loaded, small), output)
    assert output.read_bytes() == first and log.read_text() == "".join(lines)


def test_arms_with_memorize(loaded, tmp_path) -> None:
    adapt = Memorize().adapt
    small = grid(samples_per_length=1, context_lengths=(460,), max_new_tokens=4)
    result = evaluate(Niah(loaded, replace(small, memorize=Memorize(adapt=adapt))), tmp_path / "a.json")
    assert [m.arm for m in result.metrics] == ["baseline", "adapted"]
    gold = Memorize(adapt=adapt, use_correct_answer=True)
    result = evaluate(Niah(loaded, replace(small, memorize=gold)), tmp_path / "g.json")
    assert [m.arm for m in result.metrics] == ["baseline", "adapted, gold text"]
    assert (tmp_path / "g.adapted.png").exists()


@pytest.mark.slow
def test_what_was_learned_is_carried_over_a_kill(loaded, tmp_path) -> None:
    loaded = replace(loaded, model=copy.deepcopy(loaded.model))
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            parameter.mul_(3)  # it was trained for six steps: its answers would not notice what it learns
    kept = Memorize(adapt=replace(Memorize().adapt, reset=False, lr=0.5))
    output, log = tmp_path / "n.json", tmp_path / "n.samples.jsonl"
    small = grid(samples_per_length=3, context_lengths=(460,), max_new_tokens=16, memorize=kept)
    evaluate(Niah(loaded, small), output)
    whole = log.read_text()
    log.write_text("".join(whole.splitlines(keepends=True)[:3]))
    evaluate(Niah(loaded, small), output)
    assert log.read_text() == whole
    anew = replace(kept, adapt=replace(kept.adapt, reset=True))
    evaluate(Niah(loaded, replace(small, memorize=anew)), tmp_path / "r.json")
    assert said(tmp_path / "r.samples.jsonl")[0] == said(log)[0]
    assert said(tmp_path / "r.samples.jsonl")[1:] != said(log)[1:]  # it matters what was read before


def said(log) -> list[str]:
    """The answers after learning."""
    return [json.loads(line)["result"]["said"]["adapted"] for line in log.read_text().splitlines()[1:]]


def test_string_match_ignores_case_and_counts_every_answer() -> None:
    assert matches("It is ABC-1 or 77.", ["abc-1", "78", "77"]) == [1, 0, 1]


def test_input_that_is_not_allowed(loaded, tmp_path) -> None:
    with pytest.raises(ValueError, match="--tasks must be one of s1, s2, .*, got 's9'"):
        Niah(loaded, grid(tasks=("s9",)))
    with pytest.raises(ValueError, match=r"context_lengths must be at least \d+ for s1 .* got 100"):
        Niah(loaded, grid(context_lengths=(100,)))
    with pytest.raises(ValueError, match="samples_per_length must be at least 1, got 0"):
        grid(samples_per_length=0)
    with pytest.raises(FileNotFoundError):
        essay_words(tmp_path / "none.txt")
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(ValueError, match="holds no words"):
        essay_words(tmp_path / "empty.txt")
