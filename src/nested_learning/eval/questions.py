"""Multiple-choice tasks with the prompts of lm-eval, from records of three shapes.

A record is a dictionary, such as a line of `piqa.jsonl`. Its fields tell its shape: the fields of the
original data set, which `TASKS` lists with the split that lm-eval scores, or `CHOICES` or `CONTEXTS`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from os.path import commonprefix
from pathlib import Path
from typing import Any

from nested_learning.data.records import read_records
from nested_learning.extras import MissingExtraError
from nested_learning.hub import check_hub

Fields = dict[str, Any]
ENDINGS = (".jsonl", ".json", ".parquet")
CHOICES = ("query", "choices", "gold")
CONTEXTS = ("context_options", "continuation", "gold")


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """A question as text.

    Args:
        pairs: context and continuation of every answer.
        answers: the answers; "acc_norm" divides by their lengths.
        gold: number of the right answer.
        shown: the part of the question that gives no answer away.
    """

    pairs: list[tuple[str, str]]
    answers: list[str]
    gold: int
    shown: str

    @property
    def solved(self) -> str:
        """The text with its right answer."""
        return "".join(self.pairs[self.gold])


@dataclass(frozen=True, kw_only=True, slots=True)
class ChoiceTask:
    """A multiple-choice task.

    Args:
        harness: its name in lm-eval.
        folder: its folder among the tasks of lm-eval.
        fields: the fields of a record of the original data set.
        build: turns such a record into a question.
        prompt: turns the `query` of a record into lm-eval's prompt, where the query allows it.
        choices: number of answers of a question; None where that differs between questions.
        normalized: whether "acc_norm" is reported, as lm-eval does.
        split: the split that lm-eval scores, which local files should hold.
    """

    harness: str
    folder: str
    fields: tuple[str, ...]
    build: Callable[[Fields], Question]
    prompt: Callable[[str], str]
    choices: int | None
    normalized: bool = False
    split: str = "validation"


class RecordError(ValueError):
    """A record is wrong: it lacks a field, for example, or its label names no choice."""


def _number(record: Fields, field: str, names: Sequence[str]) -> int:
    """Number of the choice that a field names, as text or as an integer."""
    label = record[field]
    if isinstance(label, str | int) and str(label) in names:
        return names.index(str(label))
    raise RecordError(
        f"{field} = {label!r}; allowed: {', '.join(names)} (test splits often have none and cannot be scored)"
    )


def _asked(prompt: str, answers: list[str], gold: int) -> Question:
    if wrong := [answer for answer in answers if not isinstance(answer, str)]:
        raise ValueError(f"answers must be texts, got {wrong[0]!r}")
    return Question(pairs=[(prompt, f" {a}") for a in answers], answers=answers, gold=gold, shown=prompt)


def _piqa(record: Fields) -> Question:
    prompt = f"Question: {record['goal']}\nAnswer:"
    return _asked(prompt, [record["sol1"], record["sol2"]], _number(record, "label", ("0", "1")))


def _hellaswag(record: Fields) -> Question:
    context = f"{record['ctx_a']} {record['ctx_b'].capitalize()}"
    prompt = _without_brackets(f"{record['activity_label']}: {context}")
    endings = [_without_brackets(end) for end in record["endings"]]
    return _asked(prompt, endings, _number(record, "label", [str(i) for i in range(len(endings))]))


def _without_brackets(text: str) -> str:
    """WikiHow's headings and marks removed."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def _winogrande(record: Fields) -> Question:
    """The answers are contexts; the score of each is that of the same end of the sentence after it."""
    sentence, blank = record["sentence"], record["sentence"].index("_")
    contexts = [sentence[:blank] + record[name] for name in ("option1", "option2")]
    end = f" {sentence[blank + 1 :].strip()}"
    return Question(
        pairs=[(context, end) for context in contexts],
        answers=contexts,
        gold=_number(record, "answer", ("1", "2")),
        shown=sentence,
    )


def _arc(record: Fields) -> Question:
    labels, texts = [str(label) for label in record["choices"]["label"]], list(record["choices"]["text"])
    if len(set(labels)) != len(texts) or len(labels) != len(texts):
        raise ValueError(f"choices must have a label each, got {len(texts)} texts and labels {labels}")
    gold = _number(record, "answerKey", labels)
    return _asked(f"Question: {record['question']}\nAnswer:", texts, gold)


def _boolq(record: Fields) -> Question:
    prompt = f"{record['passage']}\nQuestion: {record['question']}?\nAnswer:"
    return _asked(prompt, ["no", "yes"], _number(record, "label", ("0", "1", "False", "True")) % 2)


def _siqa(record: Fields) -> Question:
    answers = [record[name] for name in ("answerA", "answerB", "answerC")]
    return _asked(
        f"Q: {record['context']} {record['question']}\nA:", answers, _number(record, "label", ("1", "2", "3"))
    )


def _choices(task: ChoiceTask, record: Fields) -> Question:
    """A question and its answers, without the fields that they were made of."""
    answers = _texts(record, "choices")
    return _asked(task.prompt(_text(record, "query")), answers, _index(record, len(answers)))


def _contexts(task: ChoiceTask, record: Fields) -> Question:
    """One continuation of several contexts, as in `_winogrande`."""
    contexts = [context.rstrip() for context in _texts(record, "context_options")]
    end = f" {_text(record, 'continuation').strip()}"
    same = commonprefix(contexts)  # noqa: RUF071 - of characters, cut back to whole words below
    return Question(
        pairs=[(context, end) for context in contexts],
        answers=contexts,
        gold=_index(record, len(contexts)),
        shown=f"{same[: same.rfind(' ') + 1]}_{end}",
    )


def _text(record: Fields, field: str) -> str:
    text = record[field]
    if not isinstance(text, str):
        raise RecordError(f"{field} must be a text, got {text!r}")
    return text


def _texts(record: Fields, field: str) -> list[str]:
    texts = record[field]
    if not isinstance(texts, list) or len(texts) < 2 or not all(isinstance(text, str) for text in texts):
        raise RecordError(f"{field} must be a list of two or more texts, got {texts!r}")
    return texts


def _index(record: Fields, count: int) -> int:
    return _number(record, "gold", [str(number) for number in range(count)])


def _framed(head: str, tail: str, query: str) -> str:
    """A query between head and tail if it is one line or begins with the head, otherwise as it is."""
    text = query.rstrip()
    if text.endswith(tail.strip()) or ("\n" in text and not text.startswith(head)):
        return text
    return head + query.removesuffix("\n").removeprefix(head) + tail  # lm-eval keeps spaces at the end


_question_prompt = partial(_framed, "Question: ", "\nAnswer:")
_q_prompt = partial(_framed, "Q: ", "\nA:")


def _passage_prompt(query: str) -> str:
    """A query of a passage and one line with the question, as `_boolq` writes them."""
    text = query.rstrip()
    if (found := PASSAGE.fullmatch(text)) is None:
        return text
    return f"{found['passage']}\nQuestion: {found['question']}?\nAnswer:"


PASSAGE = re.compile(
    r"(?:Passage: )?(?P<passage>.*)\nQuestion: (?P<question>[^\n]*?)\??(?:\s+Answer:)?", re.DOTALL
)
ARC = ("question", "choices", "answerKey")
TASKS: dict[str, ChoiceTask] = {
    "piqa": ChoiceTask(
        harness="piqa",
        folder="piqa",
        fields=("goal", "sol1", "sol2", "label"),
        build=_piqa,
        prompt=_question_prompt,
        choices=2,
        normalized=True,
    ),
    "hellaswag": ChoiceTask(
        harness="hellaswag",
        folder="hellaswag",
        fields=("activity_label", "ctx_a", "ctx_b", "endings", "label"),
        build=_hellaswag,
        prompt=str.rstrip,
        choices=4,
        normalized=True,
    ),
    "winogrande": ChoiceTask(
        harness="winogrande",
        folder="winogrande",
        fields=("sentence", "option1", "option2", "answer"),
        build=_winogrande,
        prompt=str.rstrip,
        choices=2,
    ),
    "arc_easy": ChoiceTask(
        harness="arc_easy",
        folder="arc",
        fields=ARC,
        build=_arc,
        prompt=_question_prompt,
        choices=None,
        normalized=True,
        split="test",
    ),
    "arc_challenge": ChoiceTask(
        harness="arc_challenge",
        folder="arc",
        fields=ARC,
        build=_arc,
        prompt=_question_prompt,
        choices=None,
        normalized=True,
        split="test",
    ),
    "boolq": ChoiceTask(
        harness="boolq",
        folder="super_glue/boolq",
        fields=("passage", "question", "label"),
        build=_boolq,
        prompt=_passage_prompt,
        choices=2,
    ),
    "siqa": ChoiceTask(
        harness="social_iqa",
        folder="siqa",
        fields=("context", "question", "answerA", "answerB", "answerC", "label"),
        build=_siqa,
        prompt=_q_prompt,
        choices=3,
    ),
}
INSTEAD_OF_HUB = f"give --local-dir for {', '.join(TASKS)}"


def read_questions(task: str, local_dir: Path | None, limit: int | None) -> list[Question]:
    """The first `limit` questions of a task, from a folder or else from the hub through lm-eval.

    All records are checked: labels that count from 1 instead of 0 may begin with some that look right.

    Args:
        local_dir: a folder with `TASK.jsonl`, `.json` (a list) or `.parquet`.

    Raises:
        FileNotFoundError: no file of the task in the folder, or none on the hub.
        ConnectionError: the hub cannot be reached.
        ValueError: a record without the fields of any shape, or with a label that names no choice.
    """
    records: Iterator[tuple[str, Fields]]
    records = _hub_records(task) if local_dir is None else read_records(_local_file(task, local_dir))
    found = []
    for where, record in records:
        try:
            found.append(_read(TASKS[task], record))
        except RecordError as error:
            raise ValueError(f"{where}: {error}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{where}: cannot be read: {error}") from error
    if not found:
        raise ValueError(f"{task}: there are no records in {local_dir or 'its split'}")
    return found[:limit]


def _read(task: ChoiceTask, record: Fields) -> Question:
    """The question of a record in the shape whose fields it has; its own shape goes before the others."""
    shapes: dict[tuple[str, ...], Callable[[Fields], Question]]
    shapes = {task.fields: task.build, CHOICES: partial(_choices, task), CONTEXTS: partial(_contexts, task)}
    having = {fields: [name in record for name in fields] for fields in shapes}
    fields = max(shapes, key=lambda fields: (all(having[fields]), sum(having[fields])))
    if missing := [name for name in fields if name not in record]:
        if "context" in record and "continuation" in record:
            raise RecordError("a context with one continuation is no choice; give context_options and gold")
        raise RecordError(f"lacks {', '.join(missing)}; it has {', '.join(record) or 'nothing'}")
    return shapes[fields](record)


def _local_file(task: str, folder: Path) -> Path:
    path = next((p for end in ENDINGS if (p := folder / f"{task}{end}").is_file()), None)
    if path is None:
        raise FileNotFoundError(f"there is no {task}{', '.join(ENDINGS)} in {folder}")
    return path


def _hub_records(task: str) -> Iterator[tuple[str, Fields]]:
    """Documents as lm-eval loads them, before it changes them, each with a name for messages."""
    check_hub(INSTEAD_OF_HUB)
    try:
        documents = _harness_documents(TASKS[task])
    except OSError as error:
        raise FileNotFoundError(
            f"{task}: its data cannot be had from the hub ({error}); "
            f"give --local-dir with {task}.jsonl, see docs/evaluation.md"
        ) from error
    return ((f"{task}, record {number}", record) for number, record in enumerate(documents, 1))


def _harness_documents(task: ChoiceTask) -> Any:
    """The split of a task as lm-eval loads it."""
    try:
        from lm_eval import tasks
    except ImportError as error:
        raise MissingExtraError("task data from the hub (--local-dir does without)", "lm_eval") from error
    # Only the folder of the task: to look through all of lm-eval's takes seconds.
    folder = Path(tasks.__path__[0]) / task.folder
    manager = tasks.TaskManager(include_path=str(folder), include_defaults=False)
    found: Any = tasks.get_task_dict([task.harness], manager)[task.harness]
    return found.dataset[task.split]
