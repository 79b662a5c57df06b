"""Labels that name no choice: hidden ones, those of another base, and values of another kind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nested_learning.eval.intents import Example, read_examples
from nested_learning.eval.questions import read_questions

DATA = Path(__file__).parent / "data" / "zeroshot"
FIELDS = {
    "piqa": "label",
    "hellaswag": "label",
    "winogrande": "answer",
    "arc_easy": "answerKey",
    "arc_challenge": "answerKey",
    "boolq": "label",
    "siqa": "label",
}
WRONG = [
    *[("piqa", label) for label in (-1, "-1", "", None, 2, "sol1", "A", 0.5, 1.0, True, [0])],
    *[("hellaswag", label) for label in (-1, "", None, 4, "4", "A", 2.5, False)],
    *[("winogrande", label) for label in ("", None, 0, "0", 3, "3", "-1", "option1", 1.5)],
    *[("arc_easy", label) for label in ("", None, -1, "E", "1", "a", 0)],
    *[("arc_challenge", label) for label in ("", "E", -1)],
    *[("boolq", label) for label in (-1, "", None, 2, "maybe", 0.5)],
    *[("siqa", label) for label in ("", None, 0, "0", -1, "4", "A", 1.5)],
]


def write(folder: Path, task: str, label: object, at: int = 1) -> Path:
    """The task's own records, with another label in one of them."""
    records = [json.loads(line) for line in (DATA / f"{task}.jsonl").read_text().splitlines()]
    records[at][FIELDS[task]] = label
    path = folder / f"{task}.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    return path


@pytest.mark.parametrize(("task", "label"), WRONG)
def test_a_label_that_names_no_choice_is_refused(tmp_path, task, label):
    path = write(tmp_path, task, label)
    with pytest.raises(ValueError) as error:
        read_questions(task, tmp_path, None)
    message = str(error.value)
    assert message.startswith(f"{path}, line 2: {FIELDS[task]} = {label!r}; allowed: ")
    assert message.endswith("(test splits often have none and cannot be scored)")
    assert "\n" not in message


def test_the_message_says_what_is_allowed(tmp_path):
    expected = {
        "piqa": "0, 1",
        "hellaswag": "0, 1, 2, 3",
        "winogrande": "1, 2",
        "arc_easy": "A, B, C, D",
        "boolq": "0, 1, False, True",
        "siqa": "1, 2, 3",
    }
    for task, allowed in expected.items():
        write(tmp_path, task, "?")
        with pytest.raises(ValueError, match=rf"allowed: {allowed} \("):
            read_questions(task, tmp_path, None)


@pytest.mark.parametrize(
    ("task", "label", "gold"),
    [
        ("piqa", 1, 1),
        ("piqa", "1", 1),
        ("hellaswag", 3, 3),
        ("hellaswag", "0", 0),
        ("winogrande", 2, 1),
        ("winogrande", "1", 0),
        ("arc_easy", "D", 3),
        ("boolq", True, 1),
        ("boolq", False, 0),
        ("boolq", "0", 0),
        ("siqa", 3, 2),
        ("siqa", "1", 0),
    ],
)
def test_labels_as_numbers_and_as_text(tmp_path, task, label, gold):
    write(tmp_path, task, label)
    assert read_questions(task, tmp_path, None)[1].gold == gold


def test_digits_name_the_choices_of_arc_where_they_are_its_labels(tmp_path):
    record = {"question": "x", "choices": {"text": ["a", "b"], "label": ["1", "2"]}, "answerKey": "2"}
    path = tmp_path / "arc_easy.jsonl"
    path.write_text(json.dumps(record))
    assert read_questions("arc_easy", tmp_path, None)[0].gold == 1
    path.write_text(json.dumps({**record, "answerKey": "B"}))
    with pytest.raises(ValueError, match="answerKey = 'B'; allowed: 1, 2 "):
        read_questions("arc_easy", tmp_path, None)
    for labels in (["1", "1"], ["1", "2", "3"]):
        path.write_text(json.dumps({**record, "choices": {"text": ["a", "b"], "label": labels}}))
        with pytest.raises(ValueError, match="line 1: cannot be read: choices must have a label each"):
            read_questions("arc_easy", tmp_path, None)


def test_labels_behind_the_first_questions_are_looked_at_too(tmp_path):
    """Of a file that counts from 1, the first labels may all be among those that count from 0."""
    write(tmp_path, "piqa", 2, at=2)
    with pytest.raises(ValueError, match="line 3: label = 2"):
        read_questions("piqa", tmp_path, 1)


def test_answers_are_texts(tmp_path):
    path = tmp_path / "piqa.jsonl"
    path.write_text(json.dumps({"goal": "x", "sol1": "a", "sol2": None, "label": 0}))
    with pytest.raises(ValueError, match="line 1: cannot be read: answers must be texts, got None"):
        read_questions("piqa", tmp_path, None)


@pytest.mark.parametrize("label", [None, "", " ", ["x"], float("nan")])
@pytest.mark.parametrize("ending", ["json", "jsonl"])
def test_examples_without_a_class_are_refused(tmp_path, ending, label):
    path = tmp_path / f"a.{ending}"
    if ending == "json":
        path.write_text(json.dumps({"train": [["a", "x"], ["b", label]]}))
    else:
        path.write_text(
            json.dumps({"text": "a", "label": "x"}) + "\n" + json.dumps({"text": "b", "label": label})
        )
    with pytest.raises(ValueError, match=r"(line|record) 2: label must name a class, got"):
        read_examples(path, "train")


def test_rows_of_a_table_without_a_class_are_refused(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text,category\na,weather\nb,\n")
    with pytest.raises(ValueError, match=r"a\.csv, line 3: category must name a class, got ''"):
        read_examples(path, "train")


def test_classes_may_be_numbers(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"train": [["a", 3], ["b", -1]]}))
    assert read_examples(path, "train") == [Example("a", "3"), Example("b", "-1")]
