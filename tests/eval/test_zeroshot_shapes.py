"""Records with `query`, `choices` and `gold`, or with `context_options`, `continuation` and `gold`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nested_learning.eval.evaluation import evaluate
from nested_learning.eval.questions import TASKS, read_questions
from nested_learning.eval.samples import samples_path
from nested_learning.eval.zeroshot import ZeroShot, ZeroShotSettings

DATA = Path(__file__).parent / "data" / "zeroshot"
PLAIN = {"query": "x", "choices": ["a", "b"], "gold": 0}
CONTEXTS = {"context_options": ["x a", "x b"], "continuation": "y", "gold": 0}


def own(task):
    return [json.loads(line) for line in (DATA / f"{task}.jsonl").read_text().splitlines()]


def arc(record):
    choices = record["choices"]
    gold = choices["label"].index(record["answerKey"])
    return {"query": f"Question: {record['question']}", "choices": choices["text"], "gold": gold}


def hellaswag(record):
    """As lm-eval itself makes `query` and `choices` of the fields."""
    from lm_eval.tasks.hellaswag.utils import preprocess

    context = f"{record['ctx_a']} {record['ctx_b'].capitalize()}"
    choices = [preprocess(ending) for ending in record["endings"]]
    query = preprocess(f"{record['activity_label']}: {context}")
    return {"query": query, "choices": choices, "gold": int(record["label"])}


def winogrande(record):
    before, _, after = record["sentence"].partition("_")
    contexts = [before + record[option] for option in ("option1", "option2")]
    return {"context_options": contexts, "continuation": after.strip(), "gold": int(record["answer"]) - 1}


GENERIC = {
    "piqa": lambda r: {
        "query": f"Question: {r['goal']}\n",
        "choices": [r["sol1"], r["sol2"]],
        "gold": r["label"],
    },
    "hellaswag": hellaswag,
    "winogrande": winogrande,
    "arc_easy": arc,
    "arc_challenge": arc,
    "boolq": lambda r: {
        "query": f"Passage: {r['passage']}\nQuestion: {r['question']}?",
        "choices": ["no", "yes"],
        "gold": r["label"],
    },
    "siqa": lambda r: {
        "query": f"{r['context']} {r['question']}",
        "choices": [r["answerA"], r["answerB"], r["answerC"]],
        "gold": int(r["label"]) - 1,
    },
}


def write(folder, task, *records):
    path = folder / f"{task}.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def read(folder, task, *records):
    write(folder, task, *records)
    return read_questions(task, folder, None)


@pytest.fixture
def generic(tmp_path):
    """A folder with the questions of `DATA`, without the fields of the original sets."""
    for task, convert in GENERIC.items():
        write(tmp_path, task, *map(convert, own(task)))
    return tmp_path


@pytest.mark.parametrize("task", TASKS)
def test_all_shapes_make_the_same_questions(generic, task):
    """Prompts, answers, what is right, and what may be shown of the question."""
    assert read_questions(task, generic, None) == read_questions(task, DATA, None)


def test_all_shapes_have_the_same_log_likelihoods_and_accuracies(loaded, generic, tmp_path):
    results, samples = [], []
    for folder in (DATA, generic):
        output = tmp_path / folder.name / "out.json"
        results.append(evaluate(ZeroShot(loaded, ZeroShotSettings(local_dir=folder)), output).metrics)
        samples.append(samples_path(output).read_text().splitlines()[1:])
    assert results[0] == results[1]
    assert samples[0] == samples[1]
    assert {metric.name for metric in results[1] if metric.task == "piqa"} == {"acc", "acc_norm"}


def test_shapes_may_be_mixed_in_a_file(tmp_path):
    first, second, *_ = own("winogrande")
    mixed = read(tmp_path, "winogrande", first, winogrande(second))
    assert mixed == read_questions("winogrande", DATA, 2)


def test_the_fields_of_the_task_go_before_the_others(tmp_path):
    """lm-eval's hellaswag adds `query`, `choices` and `gold` to the record."""
    record = own("piqa")[1]
    assert read(tmp_path, "piqa", record | PLAIN) == read(tmp_path, "piqa", record)
    del record["label"]
    assert read(tmp_path, "piqa", record | PLAIN) == read(tmp_path, "piqa", PLAIN)


@pytest.mark.parametrize(
    ("task", "query", "prompt"),
    [
        *[
            (task, query, "Question: Which is wet?\nAnswer:")
            for task in ("piqa", "arc_easy", "arc_challenge")
            for query in (
                "Which is wet?",
                "Question: Which is wet?",
                "Question: Which is wet?\n",
                "Question: Which is wet?\nAnswer:",
                "Question: Which is wet?\nAnswer: ",
            )
        ],
        ("piqa", "Question: Get wet \n", "Question: Get wet \nAnswer:"),
        ("arc_easy", "Question: Which?\nA. sea\nB. sand", "Question: Which?\nA. sea\nB. sand\nAnswer:"),
        ("piqa", "Goal: get wet\nSolution: ", "Goal: get wet\nSolution:"),
        *[
            ("boolq", query, "It rains.\nIt pours.\nQuestion: is it dry?\nAnswer:")
            for query in (
                "It rains.\nIt pours.\nQuestion: is it dry",
                "Passage: It rains.\nIt pours.\nQuestion: is it dry?",
                "Passage: It rains.\nIt pours.\nQuestion: is it dry? Answer:",
                "It rains.\nIt pours.\nQuestion: is it dry?\nAnswer:\n",
            )
        ],
        ("boolq", "It rains. Is it dry?", "It rains. Is it dry?"),
        (
            "boolq",
            "Text\nQuestion: dry?\nA. no\nB. yes\nAnswer:",
            "Text\nQuestion: dry?\nA. no\nB. yes\nAnswer:",
        ),
        ("siqa", "Q: Al fell. Why?", "Q: Al fell. Why?\nA:"),
        ("siqa", "Q: Al fell. Why?\nA:", "Q: Al fell. Why?\nA:"),
        ("siqa", "Context: Al fell.\nQuestion: Why?\nAnswer:", "Context: Al fell.\nQuestion: Why?\nAnswer:"),
        ("hellaswag", "Rowing: Four people ", "Rowing: Four people"),
        ("winogrande", "Al fell because", "Al fell because"),
    ],
)
def test_a_query_gets_what_it_lacks_of_the_prompt(tmp_path, task, query, prompt):
    (question,) = read(tmp_path, task, {**PLAIN, "query": query})
    assert question.pairs == [(prompt, " a"), (prompt, " b")]
    assert question.shown == prompt


def test_what_is_shown_of_contexts_gives_no_answer_away(tmp_path):
    """Mary and Maria share letters, and `Ann` is the beginning of `Ann Lee`."""
    for first, second in (("Mary", "Maria"), ("Ann", "Ann Lee")):
        contexts = [f"Tom thanked her, so {name}" for name in (first, second)]
        record = {"context_options": contexts, "continuation": "smiled.", "gold": 1}
        (question,) = read(tmp_path, "winogrande", record)
        assert question.pairs == [(context, " smiled.") for context in contexts]
        assert (question.gold, question.shown) == (1, "Tom thanked her, so _ smiled.")


def test_answers_are_counted_question_by_question(loaded, tmp_path):
    write(tmp_path, "siqa", PLAIN, {**PLAIN, "choices": ["a", "b", "c", "d"], "gold": "3"})
    settings = ZeroShotSettings(tasks=("siqa",), local_dir=tmp_path)
    result = evaluate(ZeroShot(loaded, settings), tmp_path / "out.json")
    assert result.metrics[0].chance == pytest.approx((1 / 2 + 1 / 4) / 2)


@pytest.mark.parametrize("shape", [PLAIN, CONTEXTS], ids=["choices", "contexts"])
@pytest.mark.parametrize("gold", [-1, "-1", "", None, 2, "A", "a", 0.0, True, [0]])
def test_a_gold_that_names_no_choice_is_refused(tmp_path, shape, gold):
    path = write(tmp_path, "boolq", shape, {**shape, "gold": gold})
    with pytest.raises(ValueError) as error:
        read_questions("boolq", tmp_path, None)
    assert str(error.value).startswith(f"{path}, line 2: gold = {gold!r}; allowed: 0, 1 (")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"query": "x", "choices": ["a", "b"]}, "lacks gold; it has query, choices"),
        ({"context_options": ["a", "b"], "gold": 0}, "lacks continuation; it has context_options, gold"),
        ({"text": "x"}, "lacks goal, sol1, sol2, label; it has text"),
        (
            {"context": "x", "continuation": "y"},
            "a context with one continuation is no choice; give context_options and gold",
        ),
        ({**PLAIN, "choices": "ab"}, "choices must be a list of two or more texts, got 'ab'"),
        ({**PLAIN, "choices": ["a"]}, r"choices must be a list of two or more texts, got \['a'\]"),
        ({**PLAIN, "choices": ["a", 1]}, "choices must be a list of two or more texts"),
        ({**PLAIN, "choices": {"text": ["a"]}}, "choices must be a list of two or more texts"),
        ({**CONTEXTS, "context_options": None}, "context_options must be a list of two or more texts"),
        ({**PLAIN, "query": 3}, "query must be a text, got 3"),
        ({**CONTEXTS, "continuation": ["y"]}, r"continuation must be a text, got \['y'\]"),
    ],
)
def test_records_of_no_shape_are_refused(tmp_path, record, message):
    write(tmp_path, "piqa", record)
    with pytest.raises(ValueError, match=f"piqa.jsonl, line 1: {message}"):
        read_questions("piqa", tmp_path, None)
