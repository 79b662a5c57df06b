"""RULER's needle-in-a-haystack tasks (Hsieh et al., arXiv 2404.06654, its `niah` tasks).

A needle ties one or more magic values to a key; the haystack is five sentences repeated ("noise"), a text
("essay"), or further needles ("needle"). The prompt ends where the answer begins. Differences from RULER:
words for keys come from our own lists, sentences of a text end at ".", "!" or "?" before white space, and
all keys and values of a sample are different.
"""

from __future__ import annotations

import hashlib
import random
import re
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nested_learning.checks import one_of
from nested_learning.data.corpus import bundled_files
from nested_learning.data.records import read_text
from nested_learning.eval.haystack import NOISE, Grid, Haystack, Retrieval
from nested_learning.eval.loading import Loaded

MAX_NEW_TOKENS = 128
NEEDLE = "One of the special magic {kind} for {key} is: {value}."
PROMPT = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.\n{context}\n"
    "What are all the special magic {kind} for {query} mentioned in the provided text? "
    "The special magic {kind} for {query} mentioned in the provided text are"
)
PROMPT_FOR_ONE = (
    "A special magic {kind} is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.\n{context}\n"
    "What is the special magic {kind} for {query} mentioned in the provided text? "
    "The special magic {kind} for {query} mentioned in the provided text is"
)
DEPTHS = tuple(round(100 * i / 39) / 100 for i in range(40))
"""Depths of needles in a text; they are drawn without replacement."""
_ADJECTIVES = """
ancient bitter bold brave breezy bright broad calm careful cheerful chilly clever cloudy cosy crisp
curious dapper dusty eager early elegant faint famous fearless fierce gentle giant glad golden
graceful grand hasty hollow honest humble icy jolly keen kind lively lonely loud lucky mellow mighty
misty modest narrow noble odd patient plain polite proud quick quiet rapid rare rough round rusty
shiny silent silver simple sleepy slow smooth solid steady strange sturdy subtle sunny swift tall
tidy tiny tough vast vivid warm weary wide wild wise witty young
"""
ADJECTIVES = tuple(_ADJECTIVES.split())
_NOUNS = """
acorn anchor apron arrow badge bakery barrel basket beacon bell blossom bottle branch bridge brook
bucket button cabin candle canyon carpet castle cellar chimney clock coat compass copper cradle
crystal curtain dagger desk diary dolphin donkey drum eagle engine falcon feather fence flute forest
fountain garden glacier goose hammer harbor helmet hill island jacket kettle kite ladder lantern
lemon magnet maple meadow mirror moth needle oasis orchard otter paddle parade pebble pencil pigeon
pillow planet pocket quarry ribbon river saddle sailor shadow shell spoon stable statue summit
tunnel turtle umbrella valley velvet violin wagon walnut whistle willow window
"""
NOUNS = tuple(_NOUNS.split())
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


@dataclass(frozen=True, kw_only=True, slots=True)
class NeedleTask:
    """A task of RULER: what is hidden where, and what is asked.

    Args:
        haystack: "noise", "essay" or "needle".
        keys, values: "words" (adjective-noun), "numbers" (7 digits) or "uuids".
        num_keys, num_values, num_queries: keys in the haystack, values of each, keys asked for.
    """

    haystack: str
    keys: str = "words"
    values: str = "numbers"
    num_keys: int = 1
    num_values: int = 1
    num_queries: int = 1

    @property
    def num_needles(self) -> int:
        """Number of needles, not counting those that make up the haystack."""
        return self.num_keys * self.num_values


TASKS: dict[str, NeedleTask] = {
    "s1": NeedleTask(haystack="noise"),
    "s2": NeedleTask(haystack="essay"),
    "s3": NeedleTask(haystack="essay", values="uuids"),
    "mk1": NeedleTask(haystack="essay", num_keys=4),
    "mk2": NeedleTask(haystack="needle"),
    "mk3": NeedleTask(haystack="needle", keys="uuids", values="uuids"),
    "mv": NeedleTask(haystack="essay", num_values=4),
    "mq": NeedleTask(haystack="essay", num_keys=4, num_queries=4),
}


class Niah(Retrieval):
    """Asks for needles; the score of a sample is the share of its answers that the generated text contains.

    Args:
        loaded: the checkpoint.
        grid: which samples; its tasks are keys of `TASKS`.
        haystack: text from which essays are cut; None = the bundled speeches.

    Raises:
        ValueError: an unknown task, or a context length without room for a prompt.
        FileNotFoundError: no such text.
    """

    name = "niah"
    metric = "string_match_all"

    def __init__(self, loaded: Loaded, grid: Grid, haystack: Path | None = None) -> None:
        for task in grid.tasks:
            one_of("--tasks", task, TASKS)
        self.words = essay_words(haystack)
        super().__init__(loaded, grid)

    def build(self, task: str, size: int, depth: float, rng: random.Random) -> Haystack:
        """A prompt with a haystack of `size`."""
        return needle_prompt(TASKS[task], self.words, size, depth, rng)

    def settings(self) -> dict[str, Any]:
        """See `Evaluation`; "haystack" is the SHA-256 of the text from which essays are cut."""
        return {**super().settings(), "haystack": hashlib.sha256(" ".join(self.words).encode()).hexdigest()}


def essay_words(path: Path | None = None) -> list[str]:
    """Words of the text from which "essay" haystacks are cut: a UTF-8 file, or the bundled speeches.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file without words, or not in UTF-8.
    """
    file = path or next(file for file in bundled_files() if file.name == "speeches.txt")
    words = read_text(file).split()
    if not words:
        raise ValueError(f"haystack {file} holds no words")
    return words


def random_key(kind: str, rng: random.Random) -> str:
    """A key or value of a kind: "words", "numbers" or "uuids"."""
    if kind == "words":
        return f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"
    if kind == "numbers":
        return str(rng.randint(10**6, 10**7 - 1))
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def needle_prompt(
    task: NeedleTask, words: list[str], size: int, depth: float | None, rng: random.Random
) -> Haystack:
    """A prompt of `task` with a haystack of `size`: words of an essay, sentences of noise, or needles.

    The essay begins with the first of `words`, and repeats them if they are too few.

    Args:
        depth: depth of the first needle that is asked for, 0 to 1; None = drawn, like those of the others.

    Raises:
        ValueError: a haystack too small for its needles.
    """
    if size < task.num_needles:
        raise ValueError(f"size must be at least {task.num_needles}, got {size}")
    pairs, asked = _facts(task, rng)
    places = _places(task, size, rng)
    answers = [(key, value) for key, value in pairs if key in asked]
    rng.shuffle(pairs)
    if depth is not None:
        places[pairs.index(answers[0])] = depth
    needles = [NEEDLE.format(kind=task.values, key=key, value=value) for key, value in pairs]
    if task.haystack == "needle":
        sentences = _distractors(task, size, {text for pair in pairs for text in pair}, rng)
    else:
        sentences = _text(task, words, size)
    context, depths = _insert(sentences, needles, places, " " if task.haystack == "essay" else "\n")
    one = len(answers) == 1
    prompt = (PROMPT_FOR_ONE if one else PROMPT).format(
        kind=task.values.removesuffix("s") if one else task.values, context=context, query=_join(asked)
    )
    return Haystack(
        prompt=prompt,
        answers=tuple(value for _, value in answers),
        depths=tuple(depths[pairs.index(answer)] for answer in answers),
    )


def _facts(task: NeedleTask, rng: random.Random) -> tuple[list[tuple[str, str]], list[str]]:
    """Key and value of every needle, and the keys that are asked for."""
    keys = _distinct(task.keys, task.num_keys, rng)
    values = _distinct(task.values, task.num_needles, rng)
    pairs = [
        (key, values[i * task.num_values + j]) for i, key in enumerate(keys) for j in range(task.num_values)
    ]
    asked = rng.sample(keys, task.num_queries)
    return sorted(pairs, key=lambda pair: asked.index(pair[0]) if pair[0] in asked else len(asked)), asked


def _distinct(kind: str, count: int, rng: random.Random) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        found[random_key(kind, rng)] = None
    return list(found)


def _places(task: NeedleTask, size: int, rng: random.Random) -> list[float]:
    """A random depth for every needle; in noise and among needles, no two before the same sentence."""
    if task.haystack == "essay":
        return rng.sample(DEPTHS, task.num_needles)
    return [index / size for index in rng.sample(range(size), task.num_needles)]


def _text(task: NeedleTask, words: list[str], size: int) -> list[str]:
    if task.haystack == "noise":
        return [" ".join(NOISE)] * size
    repeated = words * -(-size // len(words))
    return _SENTENCE_END.split(" ".join(repeated[:size]))


def _distractors(task: NeedleTask, size: int, taken: set[str], rng: random.Random) -> list[str]:
    """Needles with keys and values that are not `taken`."""

    def free(kind: str) -> str:
        while (found := random_key(kind, rng)) in taken:
            pass
        return found

    return [
        NEEDLE.format(kind=task.values, key=free(task.keys), value=free(task.values)) for _ in range(size)
    ]


def _insert(
    sentences: list[str], needles: list[str], places: list[float], separator: str
) -> tuple[str, list[float]]:
    """The context, each needle inserted before the sentence at its depth; and the depths after rounding."""
    before = [min(len(sentences), int(len(sentences) * place + 0.5)) for place in places]
    parts: list[str] = []
    for i in range(len(sentences) + 1):
        parts += [needle for needle, at in zip(needles, before, strict=True) if at == i]
        parts += sentences[i : i + 1]
    return separator.join(parts), [at / len(sentences) for at in before]


def _join(keys: list[str]) -> str:
    return keys[0] if len(keys) == 1 else f"{', '.join(keys[:-1])}, and {keys[-1]}"
