"""Zero-shot questions: chance level, learning, interruptions, task files, the command line."""

from __future__ import annotations

import json
import math
import random
import runpy
import sys
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from huggingface_hub import constants

from nested_learning.adapt import AdaptConfig, memorize, restart, score
from nested_learning.eval import loading, zeroshot
from nested_learning.eval.arms import Memorize
from nested_learning.eval.evaluation import evaluate
from nested_learning.eval.loading import Loaded
from nested_learning.eval.questions import TASKS, read_questions
from nested_learning.eval.results import read_result, wilson
from nested_learning.eval.samples import samples_path
from nested_learning.eval.zeroshot import ZeroShot, ZeroShotSettings
from nested_learning.models.lm import HopeLM

ROOT = Path(__file__).parents[2]
DATA = Path(__file__).parent / "data" / "zeroshot"


@pytest.fixture
def nonsense(tmp_path):
    """A folder with 60 questions of random letters per task, whose right answer is drawn."""
    draw = random.Random(0)

    def word(length=5):
        return "".join(draw.choice("abcdefghijklmnop") for _ in range(length))

    def record(task):
        made = {name: f"{word()} {word()}" for name in TASKS[task].fields}
        if task.startswith("arc"):
            made |= {"choices": {"label": list("ABCD"), "text": [word() for _ in "ABCD"]}}
            made |= {"answerKey": draw.choice("ABCD")}
        made |= {"endings": [word() for _ in range(4)], "sentence": f"{word()} _ {word()}"}
        choices = TASKS[task].choices
        first = 1 if task in ("siqa", "winogrande") else 0
        gold = str(draw.randrange(choices) + first) if choices else ""
        return made | {"label": gold, "answer": gold}

    for task in TASKS:
        lines = [json.dumps(record(task)) + "\n" for _ in range(60)]
        (tmp_path / f"{task}.jsonl").write_text("".join(lines))
    return tmp_path


@pytest.mark.thorough
def test_a_random_model_scores_at_chance(loaded, nonsense):
    torch.manual_seed(0)
    model = HopeLM(loaded.config.model).eval()
    untrained = Loaded(
        model=model, tokenizer=loaded.tokenizer, config=loaded.config, sha256="0" * 64, path=nonsense
    )
    result = evaluate(ZeroShot(untrained, ZeroShotSettings(local_dir=nonsense)), nonsense / "out.json")
    assert result.samples == 60 * 7
    hits, guessed = 0.0, 0.0
    for metric in result.metrics:
        assert metric.chance == pytest.approx(1 / (TASKS[metric.task].choices or 4))
        spread = math.sqrt(metric.chance * (1 - metric.chance) / metric.n)
        assert abs(metric.value - metric.chance) < 3.3 * spread, metric  # eleven numbers: 99.9 % each
        if metric.name == "acc":
            hits, guessed = hits + metric.value * metric.n, guessed + metric.chance * metric.n
    low, high = wilson(hits, result.samples)
    assert low < guessed / result.samples < high


def test_a_perfect_scorer_is_perfect_and_length_matters_per_character(loaded):
    question = read_questions("arc_easy", DATA, 1)[0]
    values = [(-9.0, False), (-3.0, True), (-2.0, False), (-8.0, False)]  # iron, water, salt, wood
    chosen = zeroshot.choose(question, values)
    assert (chosen["chosen"], chosen["chosen_norm"]) == (2, 2)
    values[2] = (-2.9, False)  # -0.725 per character, water -0.6
    chosen = zeroshot.choose(question, values)
    assert (chosen["chosen"], chosen["chosen_norm"]) == (2, 1)


def stop_after(monkeypatch, calls):
    original, seen = ZeroShot.score, []

    def score(self, questions):
        seen.append(questions)
        if len(seen) > calls:
            raise KeyboardInterrupt
        return original(self, questions)

    monkeypatch.setattr(ZeroShot, "score", score)


CARRYING = {
    "nothing": {},
    "what is learned": {"memorize": Memorize(adapt=AdaptConfig(lr=0.5, reset=False))},
    "the state": {"state": "carried"},
}


@pytest.mark.thorough
@pytest.mark.parametrize("carried", CARRYING)
def test_an_interrupted_evaluation_gives_the_same_file(loaded, tmp_path, monkeypatch, carried):
    """Also when something is carried from question to question."""
    plan = ZeroShotSettings(tasks=("siqa", "arc_challenge"), local_dir=DATA, **CARRYING[carried])
    monkeypatch.setattr(ZeroShot, "at_once", 2)
    evaluate(ZeroShot(loaded, plan), tmp_path / "whole.json")
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            evaluate(ZeroShot(loaded, plan), tmp_path / "cut.json")
    log = samples_path(tmp_path / "cut.json")
    lines = log.read_text().splitlines(keepends=True)
    assert len(lines) == 5
    log.write_text("".join(lines[:-1]) + lines[-1][:20])  # killed while it wrote the fourth sample
    evaluate(ZeroShot(loaded, plan), tmp_path / "cut.json")
    assert (tmp_path / "cut.json").read_bytes() == (tmp_path / "whole.json").read_bytes()
    assert sorted(log.read_text().splitlines()) == sorted(
        samples_path(tmp_path / "whole.json").read_text().splitlines()
    )


def test_carried_questions_are_one_stream(loaded, tmp_path):
    output = tmp_path / "a.json"
    evaluate(ZeroShot(loaded, ZeroShotSettings(tasks=("siqa",), local_dir=DATA, state="carried")), output)
    stream: list[int] = []
    for question, line in zip(
        read_questions("siqa", DATA, None), samples_path(output).read_text().splitlines()[1:], strict=True
    ):
        stream += question.pairs[0][0].encode()
        for (_, answer), value in zip(
            question.pairs, json.loads(line)["result"]["baseline"]["loglikelihoods"], strict=True
        ):
            losses = score(loaded.model, torch.tensor([[*stream, *answer.encode()]]))[0][0, -len(answer) :]
            assert value == pytest.approx(-losses.sum().item(), rel=1e-5)
    with pytest.raises(ValueError, match="state must be fresh with memorizing, got 'carried'"):
        ZeroShotSettings(state="carried", memorize=Memorize())


def test_data_from_the_hub_are_lm_eval_s_and_missing_ones_are_explained(monkeypatch):
    import lm_eval.tasks

    rows = [json.loads(line) for line in (DATA / "siqa.jsonl").read_text().splitlines()]

    class Loaded:
        dataset: ClassVar = {"validation": rows}

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(lm_eval.tasks, "get_task_dict", lambda names, manager: {names[0]: Loaded})
    assert read_questions("siqa", None, None) == read_questions("siqa", DATA, None)

    def missing(names, manager):
        raise ConnectionError("not downloaded")

    monkeypatch.setattr(lm_eval.tasks, "get_task_dict", missing)
    with pytest.raises(FileNotFoundError, match="siqa: its data .*not downloaded.* give --local-dir"):
        read_questions("siqa", None, None)


def test_lm_eval_has_the_tasks_where_they_are_looked_for():
    import lm_eval.tasks

    for task in TASKS.values():
        folder = Path(lm_eval.tasks.__path__[0]) / task.folder
        manager = lm_eval.tasks.TaskManager(include_path=str(folder), include_defaults=False)
        assert task.harness in manager.all_tasks


def test_a_hub_that_cannot_be_reached_is_one_line_before_weights_are_read(
    script, exported, no_hub, monkeypatch
):
    with pytest.raises(ConnectionError, match="reached: .*; give --local-dir for piqa, hellaswag"):
        read_questions("siqa", None, None)
    monkeypatch.setattr(loading, "load", lambda *_: pytest.fail("weights are read"))
    for task in ("piqa", "lambada_openai"):
        code, out, err = script("--checkpoint", exported, "--tasks", task)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert err.startswith("zeroshot.py: http://127.0.0.1:")


@pytest.mark.thorough
def test_memorizing_the_right_answer_helps_and_is_marked(loaded, tmp_path):
    """A few large steps on the solved question are enough to know it; without the answer they are not."""
    adapt = AdaptConfig(lr=1.0, steps=4)
    gain = {}
    for gold in (False, True):
        how = Memorize(adapt=adapt, use_correct_answer=gold)
        plan = ZeroShotSettings(tasks=("arc_challenge", "siqa"), local_dir=DATA, memorize=how)
        result = evaluate(ZeroShot(loaded, plan), tmp_path / f"{gold}.json")
        assert {m.arm for m in result.metrics} == {"baseline", "adapted, gold text" if gold else "adapted"}
        values = {(m.arm, m.task): m.value for m in result.metrics if m.name == "acc"}
        gain[gold] = sum(values[how.arm, task] - values["baseline", task] for task in plan.tasks)
    assert gain[True] > 0.3
    assert gain[True] > gain[False]


def test_the_adapted_arm_asks_again_in_a_new_context_with_what_was_learned(loaded):
    adapt = AdaptConfig(lr=0.5, chunk_size=16)
    question = read_questions("siqa", DATA, 1)[0]
    settings = ZeroShotSettings(tasks=("siqa",), local_dir=DATA, memorize=Memorize(adapt=adapt))
    (row,) = ZeroShot(loaded, settings).score([question])
    shown = torch.tensor([list(question.shown.encode())])
    _, state = memorize(loaded.model, shown, config=adapt)
    state = restart(loaded.model, loaded.model(shown[:, -1:], state)[1], adapt.paths)
    for (context, continuation), value in zip(question.pairs, row["adapted"]["loglikelihoods"], strict=True):
        text = torch.tensor([list((context + continuation).encode())])
        losses = score(loaded.model, text, state)[0][0, -len(continuation) :]
        assert value == pytest.approx(-losses.sum().item(), rel=1e-5)
    assert row["adapted"]["loglikelihoods"] != pytest.approx(row["baseline"]["loglikelihoods"], abs=1e-2)


def test_task_files_may_be_jsonl_json_or_parquet(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [json.loads(line) for line in (DATA / "arc_easy.jsonl").read_text().splitlines()]
    expected = read_questions("arc_easy", DATA, None)
    (tmp_path / "arc_easy.json").write_text(json.dumps(rows))
    assert read_questions("arc_easy", tmp_path, None) == expected
    (tmp_path / "arc_easy.json").unlink()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "arc_easy.parquet")
    assert read_questions("arc_easy", tmp_path, None) == expected
    assert read_questions("arc_easy", tmp_path, 2) == expected[:2]


def test_bad_task_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no piqa.jsonl, .json, .parquet in"):
        read_questions("piqa", tmp_path, None)
    (tmp_path / "piqa.jsonl").write_text('{"goal": "x", "sol1": "y"}\n')
    with pytest.raises(ValueError, match="piqa.jsonl, line 1: lacks sol2, label; it has goal, sol1"):
        read_questions("piqa", tmp_path, None)
    (tmp_path / "piqa.jsonl").write_text("")
    with pytest.raises(ValueError, match="piqa: there are no records in "):
        read_questions("piqa", tmp_path, None)
    (tmp_path / "winogrande.jsonl").write_text(
        '{"sentence": "no blank", "option1": "", "option2": "", "answer": "1"}\n'
    )
    with pytest.raises(ValueError, match="winogrande.jsonl, line 1: cannot be read"):
        read_questions("winogrande", tmp_path, None)
    with pytest.raises(ValueError, match="--tasks must be one of piqa, .*, got 'pica'; did you mean piqa"):
        ZeroShotSettings(tasks=("pica",))
    with pytest.raises(ValueError, match="max_samples must be at least 1, got 0"):
        ZeroShotSettings(max_samples=0)


@pytest.fixture
def script(monkeypatch, capsys):
    """Run scripts/eval/zeroshot.py in this process: exit code, output, errors."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["zeroshot.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(ROOT / "scripts" / "eval" / "zeroshot.py"), run_name="__main__")
        out, err = capsys.readouterr()
        return stop.value.code, out, err

    return run


def test_the_script_writes_result_samples_and_table(script, exported, tmp_path):
    output = tmp_path / "z.json"
    arguments = ["--checkpoint", exported, "--tasks", "piqa,boolq", "--local-dir", DATA, "--max-samples", 2]
    code, out, _ = script(*arguments, "--output", output, "--memorize", "--memorize-lr", "0.5")
    assert code == 0
    result = read_result(output)
    assert [(m.task, m.name, m.arm, m.n) for m in result.metrics] == [
        ("piqa", "acc", "baseline", 2),
        ("piqa", "acc_norm", "baseline", 2),
        ("piqa", "acc", "adapted", 2),
        ("piqa", "acc_norm", "adapted", 2),
        ("boolq", "acc", "baseline", 2),
        ("boolq", "acc", "adapted", 2),
    ]
    assert out.count("piqa |") == 4
    assert samples_path(output).read_text().count("\n") == 5
    code, _, err = script(*arguments, "--output", output)
    assert code == 2
    assert "--fresh" in err
    assert script(*arguments, "--output", output, "--fresh")[0] == 0
    assert {m.arm for m in read_result(output).metrics} == {"baseline"}


def test_the_script_lists_tasks_and_explains_what_is_missing(script, exported):
    code, out, _ = script("--list-tasks")
    assert code == 0
    assert all(name in out for name in TASKS)
    assert "query, choices, gold or context_options, continuation, gold" in out
    assert script()[::2] == (2, "zeroshot.py: --checkpoint is missing\n")
    code, _, err = script("--checkpoint", exported, "--tasks", "nothing", "--local-dir", DATA)
    assert code == 2
    assert "--tasks must be one of" in err and "got 'nothing'" in err
