"""Losses of two models side by side, from result files that are written by hand or by `nl eval continual`."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from nested_learning.commands.evaluation import continual, forgetting
from nested_learning.eval.beside import changes_table, draw_beside, in_words, read_matrices
from nested_learning.eval.plots import draw_matrices
from nested_learning.eval.results import EvaluationResult, average, read_result, write_result
from nested_learning.eval.segments import Segments

HOPE, OTHER = [[4.5, 5.0], [4.75, 4.25]], [[5.25, 5.5], [5.5, 5.0]]


def result(losses, checkpoints=("base", "mine"), digests=("aa", "bb"), folder="") -> EvaluationResult:
    """What `nl eval continual` writes, with two samples around every loss."""
    texts = ("novel", "own")
    metrics = [
        average(f"{text} after {name}", "loss", [value - 0.1, value + 0.1])
        for name, row in zip(checkpoints, losses, strict=True)
        for text, value in zip(texts, row, strict=True)
    ]
    return EvaluationResult(
        evaluation="continual",
        checkpoint={f"{name}/step": name for name in checkpoints},
        settings={"segments": [{"name": t, "files": [f"{folder}{t}.txt"]} for t in texts], "texts": digests},
        versions={},
        metrics=metrics,
        samples=2,
    )


def files(folder: Path, **results: EvaluationResult) -> list[Path]:
    for name, made in results.items():
        write_result(folder / f"{name}.json", made)
    return [folder / f"{name}.json" for name in results]


def test_the_table_and_the_words_by_hand(tmp_path):
    hope, other = read_matrices(files(tmp_path, hope=result(HOPE), other=result(OTHER, folder="/elsewhere/")))
    assert hope.changes() == pytest.approx([0.25, -0.75]) and other.changes() == pytest.approx([0.25, -0.5])
    rows = [re.split(r"\s*\|\s*", line)[1:-1] for line in changes_table([hope, other]).splitlines()]
    assert rows[0] == ["model", "scored on", "after base", "after mine", "change"]
    assert [row[:2] + row[4:] for row in rows[2:]] == [
        ["hope", "novel", "+0.2500"],
        ["hope", "own", "-0.7500"],
        ["other", "novel", "+0.2500"],
        ["other", "own", "-0.5000"],
    ]
    assert rows[3][3].startswith("4.2500 ± 0.19")  # 1.96 times the standard error of two samples 0.2 apart
    assert in_words(hope) == "hope: +0.250 on novel, -0.750 on own (nats per token)"


def test_the_picture_holds_the_numbers(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        "nested_learning.eval.plots.new_figure", lambda *size: drawn.append(figure(*size)) or drawn[-1]
    )
    matrices = read_matrices(files(tmp_path, hope=result(HOPE), other=result(OTHER)))
    draw_beside(matrices, tmp_path / "new" / "f.png")
    *maps, bars = drawn[0].axes
    assert [axes.get_title() for axes in maps] == ["hope", "other"]
    assert [text.get_text() for text in maps[1].texts] == ["5.250", "5.500", "5.500", "5.000"]
    assert len({axes.images[0].get_clim() for axes in maps}) == 1  # one scale
    assert [bar.get_height() for bar in bars.patches] == pytest.approx([0.25, -0.75, 0.25, -0.5])
    assert (tmp_path / "new" / "f.png").read_bytes().startswith(b"\x89PNG")


def figure(width, height):
    from nested_learning.report import new_figure

    return new_figure(width, height)


def test_a_single_model_and_three_texts_are_drawn_too(tmp_path):
    draw_matrices(
        {"a": [[1.0, 2.0, 3.0]] * 2}, {"a": [0.0] * 3}, ["x", "y"], ["p", "q", "r"], tmp_path / "f.png"
    )
    assert (tmp_path / "f.png").stat().st_size > 5000


@pytest.mark.parametrize(
    "second, said",
    [
        (result(OTHER, digests=("aa", "cc")), "results of continual differ in texts"),
        (
            result(OTHER, checkpoints=("start", "end")),
            "other has the checkpoints start, end, hope has base, mine; ",
        ),
        (
            replace(result(OTHER), evaluation="niah"),
            "other.json must hold a result of nl eval continual with",
        ),
        (replace(result(OTHER), checkpoint={"one": ""}), "with two checkpoints or more"),
    ],
)
def test_what_cannot_be_compared_is_refused(tmp_path, second, said):
    paths = files(tmp_path, hope=result(HOPE), other=second)
    with pytest.raises(ValueError, match=said):
        read_matrices(paths)


def test_two_files_of_one_name_are_refused(tmp_path):
    (path,) = files(tmp_path, hope=result(HOPE))
    with pytest.raises(ValueError, match="different names, got hope, hope"):
        read_matrices([path, path])


def test_texts_by_name():
    made = Segments.named(["novel=bundled:novel.txt", "own=a=b.txt"], 0.1)
    assert [(s.name, s.files) for s in made.segments] == [
        ("novel", ("bundled:novel.txt",)),
        ("own", ("a=b.txt",)),
    ]
    assert made.valid_fraction == 0.1
    for wrong in ("my.txt", "=my.txt", "own="):
        with pytest.raises(ValueError, match=f"NAME=FILE, got '{wrong}'"):
            Segments.named(["novel=a.txt", wrong], 0.1)
    with pytest.raises(ValueError, match="different names"):
        Segments.named(["own=a.txt", "own=b.txt"], 0.1)


def test_from_checkpoints_to_the_picture(run_folder, tmp_path, monkeypatch, capsys):
    steps = sorted((run_folder / "checkpoints").glob("step_*"))
    monkeypatch.setenv("NESTED_LEARNING_CACHE", str(tmp_path / "cache"))
    (tmp_path / "own.txt").write_text("0123456789 " * 200)
    words = [
        "--checkpoints",
        *map(str, (steps[0], steps[-1])),
        "--texts",
        f"base={run_folder.parent / 'text.txt'}",
    ]
    words += [f"own={tmp_path / 'own.txt'}", "--batch-size", "2", "--max-batches", "2"]
    monkeypatch.setattr("sys.argv", ["nl", *words, "--output", str(tmp_path / "tiny.json")])
    continual.main()
    given = read_result(tmp_path / "tiny.json")
    texts = json.loads((tmp_path / "tiny.json").read_text())["settings"]["segments"]
    assert [text["name"] for text in texts] == ["base", "own"]
    monkeypatch.setattr("sys.argv", ["nl", str(tmp_path / "tiny.json"), "--output", str(tmp_path / "f.png")])
    capsys.readouterr()
    forgetting.main()
    change = given.metrics[2].value - given.metrics[0].value
    assert f"tiny: {change:+.3f} on base" in capsys.readouterr().out
    assert (tmp_path / "f.png").is_file()
    monkeypatch.setattr("sys.argv", ["nl", str(tmp_path / "tiny.json"), "--output", "f.pdf"])
    with pytest.raises(ValueError, match=r"--output must end in \.png, got f\.pdf"):
        forgetting.main()
