"""Multiple-choice tasks with the prompts of lm-eval, from records with the fields of the original data sets.

A record is a dictionary such as a line of `piqa.jsonl`. Which fields a task needs, and which splits lm-eval
scores, is in `TASKS`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nested_learning.data.records import read_records

Record = dict[str, Any]
ENDINGS = (".jsonl", ".json", ".parquet")


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """A question as text.

    Args:
        pairs: context and continuation of every answer.
        answers: the answers, by whose lengths "acc_norm" divides.
        gold: number of the right one.
        shown: what of the question gives no answer away.
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
class Task:
    """A task.

    Args:
        harness: its name in lm-eval.
        fields: what a record must have.
        build: from a record to a question.
        choices: answers of a question; None where that differs between questions.
        normalized: whether "acc_norm" is reported, as lm-eval does.
        split: what lm-eval scores, and so should local files.
    """

    harness: str
    fields: tuple[str, ...]
    build: Callable[[Record], Question]
    choices: int | None
    normalized: bool = False
    split: str = "validation"


class LabelError(ValueError):
    """A label that names no choice."""


def _number(record: Record, field: str, names: Sequence[str]) -> int:
    """Number of the choice that a field names, as text or as an integer."""
    label = record[field]
    if isinstance(label, str | int) and str(label) in names:
        return names.index(str(label))
    raise LabelError(
        f"{field} = {label!r}; allowed: {', '.join(names)} (test splits often have none and cannot be scored)"
    )


def _asked(prompt: str, answers: list[str], gold: int) -> Question:
    if wrong := [answer for answer in answers if not isinstance(answer, str)]:
        raise ValueError(f"answers must be texts, got {wrong[0]!r}")
    return Question(pairs=[(prompt, f" {a}") for a in answers], answers=answers, gold=gold, shown=prompt)


def _piqa(record: Record) -> Question:
    prompt = f"Question: {record['goal']}\nAnswer:"
    return _asked(prompt, [record["sol1"], record["sol2"]], _number(record, "label", ("0", "1")))


def _hellaswag(record: Record) -> Question:
    context = f"{record['ctx_a']} {record['ctx_b'].capitalize()}"
    prompt = _without_brackets(f"{record['activity_label']}: {context}")
    endings = [_without_brackets(end) for end in record["endings"]]
    return _asked(prompt, endings, _number(record, "label", [str(i) for i in range(len(endings))]))


def _without_brackets(text: str) -> str:
    """WikiHow's headings and marks removed."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def _winogrande(record: Record) -> Question:
    """The answers stand in the context; what is scored is the same end of the sentence behind each."""
    sentence, blank = record["sentence"], record["sentence"].index("_")
    contexts = [sentence[:blank] + record[name] for name in ("option1", "option2")]
    end = f" {sentence[blank + 1 :].strip()}"
    return Question(
        pairs=[(context, end) for context in contexts],
        answers=contexts,
        gold=_number(record, "answer", ("1", "2")),
        shown=sentence,
    )


def _arc(record: Record) -> Question:
    labels, texts = [str(label) for label in record["choices"]["label"]], list(record["choices"]["text"])
    if len(set(labels)) != len(texts) or len(labels) != len(texts):
        raise ValueError(f"choices must have a label each, got {len(texts)} texts and labels {labels}")
    gold = _number(record, "answerKey", labels)
    return _asked(f"Question: {record['question']}\nAnswer:", texts, gold)


def _boolq(record: Record) -> Question:
    prompt = f"{record['passage']}\nQuestion: {record['question']}?\nAnswer:"
    return _asked(prompt, ["no", "yes"], _number(record, "label", ("0", "1", "False", "True")) % 2)


def _siqa(record: Record) -> Question:
    answers = [record[name] for name in ("answerA", "answerB", "answerC")]
    return _asked(
        f"Q: {record['context']} {record['question']}\nA:", answers, _number(record, "label", ("1", "2", "3"))
    )


ARC = ("question", "choices", "answerKey")
TASKS: dict[str, Task] = {
    "piqa": Task(
        harness="piqa",
        fields=("goal", "sol1", "sol2", "label"),
        build=_piqa,
        choices=2,
        normalized=True,
    ),
    "hellaswag": Task(
        harness="hellaswag",
        fields=("activity_label", "ctx_a", "ctx_b", "endings", "label"),
        build=_hellaswag,
        choices=4,
        normalized=True,
    ),
    "winogrande": Task(
        harness="winogrande",
        fields=("sentence", "option1", "option2", "answer"),
        build=_winogrande,
        choices=2,
    ),
    "arc_easy": Task(harness="arc_easy", fields=ARC, build=_arc, choices=None, normalized=True, split="test"),
    "arc_challenge": Task(
        harness="arc_challenge", fields=ARC, build=_arc, choices=None, normalized=True, split="test"
    ),
    "boolq": Task(harness="boolq", fields=("passage", "question", "label"), build=_boolq, choices=2),
    "siqa": Task(
        harness="social_iqa",
        fields=("context", "question", "answerA", "answerB", "answerC", "label"),
        build=_siqa,
        choices=3,
    ),
}


def read_questions(task: str, local_dir: Path | None, limit: int | None) -> list[Question]:
    """The first `limit` questions of a task, from a folder or else from the hub through lm-eval.

    All records are checked: labels that count from 1 instead of 0 may begin with some that look right.

    Args:
        local_dir: a folder with `TASK.jsonl`, `.json` (a list) or `.parquet`.

    Raises:
        FileNotFoundError: no file of the task in the folder, or a hub that cannot be reached.
        ValueError: a record without the fields of the task, or with a label that names no choice.
    """
    records: Iterator[tuple[str, Record]]
    records = _hub_records(task) if local_dir is None else read_records(_local_file(task, local_dir))
    found = []
    for where, record in records:
        if missing := [name for name in TASKS[task].fields if name not in record]:
            raise ValueError(f"{where}: lacks {', '.join(missing)}; it has {', '.join(record) or 'nothing'}")
        try:
            found.append(TASKS[task].build(record))
        except LabelError as error:
            raise ValueError(f"{where}: {error}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{where}: cannot be read: {error}") from error
    if not found:
        raise ValueError(f"{task}: there are no records in {local_dir or 'its split'}")
    return found[:limit]


def _local_file(task: str, folder: Path) -> Path:
    path = next((p for end in ENDINGS if (p := folder / f"{task}{end}").is_file()), None)
    if path is None:
        raise FileNotFoundError(f"there is no {task}{', '.join(ENDINGS)} in {folder}")
    return path


def _hub_records(task: str) -> Iterator[tuple[str, Record]]:
    """Documents as lm-eval loads them, before it changes them, and how to name each."""
    try:
        from lm_eval.tasks import TaskManager, get_task_dict
    except ImportError as error:
        raise ImportError(
            "task data from the hub needs lm-eval: pip install 'nested-learning[eval]'; or give --local-dir"
        ) from error
    name = TASKS[task].harness
    try:
        found: Any = get_task_dict([name], TaskManager())[name]
    except (ConnectionError, OSError) as error:
        raise FileNotFoundError(
            f"{task}: its data cannot be had from the hub ({error}); "
            f"give --local-dir with {task}.jsonl, see docs/evaluation.md"
        ) from error
    documents = found.dataset[TASKS[task].split]
    return ((f"{task}, record {number}", record) for number, record in enumerate(documents, 1))
