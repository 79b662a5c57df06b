"""The public bar: equal models on the same bytes, rates from pilots, cells and cards, and a whole run."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nested_learning.commands.reproduce import main, parser
from nested_learning.eval.loading import load
from nested_learning.models.bill import count_parameters
from nested_learning.report import STUDENT
from nested_learning.reproduce import byte_bar, byte_card
from nested_learning.reproduce.byte_bar import ByteRun
from nested_learning.reproduce.experiment import Plan
from nested_learning.train import trainer
from nested_learning.train.config import RunConfig


@pytest.fixture(autouse=True, scope="module")
def composed_once() -> Iterator[None]:
    """The same options make the same configurations: they are composed once."""
    made, compose = {}, byte_bar.contestants

    def contestants(given: Any) -> dict[str, RunConfig]:
        key = repr(sorted(vars(given).items(), key=repr))
        if key not in made:
            made[key] = compose(given)
        return made[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(byte_bar, "contestants", contestants)
        yield


def options(line: str = "") -> Any:
    return parser().parse_args(["byte-bar", *line.split()])


def plans(line: str, loss: Any = lambda run: abs(run.config.optim.lr - 1e-3)) -> tuple[Any, Plan, Plan]:
    """Options, pilots and final runs, with invented losses of the pilots."""
    given = options(line)
    pilots = given.experiment.prepare(given)
    outcome = {row: [(run, {"loss": loss(run)}) for run in runs] for row, runs in pilots.items()}
    return given, pilots, byte_bar.chosen(given, outcome)


def result(run: ByteRun, bits: float = 0.0) -> dict[str, Any]:
    """An invented result."""
    named = {"hardware": "a GPU", "git": "0123456789abcdef", "sha256": "f" * 64, "text": "e" * 64}
    sizes = {"windows": 7, "train_tokens": 10**9, "parameters": 5, "seconds": 12.0, "memory_gib": 1.5}
    curve = [[100, 3.0], [200, bits]]
    return {**named, **sizes, "bits_per_byte": bits, "low": bits - 0.1, "high": bits + 0.1, "curve": curve}


def test_models_are_equal_and_no_larger_than_the_bar() -> None:
    _, _, runs = plans("")
    assert list(runs) == ["hope", "transformer", "gated_delta"]
    sizes = {name: count_parameters(row[0].config.model) for name, row in runs.items()}
    assert all(30.3e6 < size <= 30.6e6 for size in sizes.values()), sizes


def test_all_read_the_same_bytes_in_the_same_order() -> None:
    _, pilots, runs = plans("--seeds 3 4")
    for row in runs.values():
        train = row[0].config.train
        assert [run.config.seed for run in row] == [3, 4]
        assert train.steps * train.batch_size * train.seq_len == pytest.approx(300e6, rel=0.001)
    assert len({repr((run.config.data, run.config.train)) for row in runs.values() for run in row}) == 1
    [(data, steps)] = {(repr(r[0].config.data), r[0].config.train.steps) for r in pilots.values()}
    assert data == repr(runs["hope"][0].config.data)
    assert steps == pytest.approx(runs["hope"][0].steps / 10, abs=1)


def test_a_tenth_of_the_size_is_a_smaller_model_on_fewer_bytes() -> None:
    _, _, runs = plans("--scale 0.1")
    for row in runs.values():
        train, data = row[0].config.train, row[0].config.data
        assert count_parameters(row[0].config.model) == pytest.approx(3.05e6, rel=0.02)
        assert train.steps * train.batch_size * train.seq_len == pytest.approx(30e6, rel=0.01)
        assert data.mixture.sources[0].limit == 9000 and data.shards.endswith("_0.1")


def test_every_model_gets_the_rate_of_its_best_pilot() -> None:
    best = {"hope": 2e-3, "transformer": 5e-4, "gated_delta": 1e-3}

    def loss(run: ByteRun) -> float:
        return abs(run.config.optim.lr - best[run.config.name.split("-")[0]])

    _, pilots, runs = plans("", loss)
    assert len(pilots) == 9 and {run.windows for row in pilots.values() for run in row} == {0}
    assert {name: row[0].config.optim.lr for name, row in runs.items()} == best
    assert {run.config.seed for row in pilots.values() for run in row}.isdisjoint({0, 1, 2})


def test_one_rate_needs_no_pilots() -> None:
    given, runs, more = plans("--lrs 3e-4 --models hope")
    assert list(runs) == ["hope"] and not more and runs["hope"][0].config.optim.lr == 3e-4
    assert byte_bar.pilots(given, {}) == []


def test_folders_differ_wherever_runs_do() -> None:
    _, pilots, runs = plans("")
    names = [run.config.name for row in (*pilots.values(), *runs.values()) for run in row]
    assert len(set(names)) == len(names) == 9 + 9


def test_cells_are_the_runs_numbers() -> None:
    given, pilots, runs = plans("")
    bits = {"hope": [1.5, 1.6, 1.7], "transformer": [1.7, 1.7, 1.9], "gated_delta": [1.8, 1.8, 1.8]}
    outcome = {row: [(run, {"loss": run.config.optim.lr}) for run in cells] for row, cells in pilots.items()}
    for name, cells in runs.items():
        outcome[name] = [(run, result(run, value)) for run, value in zip(cells, bits[name], strict=True)]
    report = byte_bar.report(given, outcome)
    hope = dict(zip(report.header, report.rows[0], strict=True))
    assert hope["seed 1"] == "1.6000" and hope["seconds a run"] == "12"
    half = STUDENT[1] * 0.1 / 3**0.5
    assert hope["bits per byte"] == f"1.6000 ± {half:.4f}"
    assert hope["minus Transformer"].startswith("-0.1667 ± ")
    assert report.rows[1][-2] == "-" and report.numbers[0]["bits_per_byte"] == bits["hope"]
    text = report.markdown()
    assert "The public bar is 1.721" in text and "edge of the grid: hope, transformer, gated_delta" in text
    assert "read 0.30 times" in text
    assert len(report.numbers) == 3 + 9 and report.numbers[-1]["pilot"]


def test_other_text_is_not_compared_with_the_bar() -> None:
    given, runs, _ = plans("--lrs 1e-3 --text bundled --models hope")
    outcome = {name: [(run, result(run, 1.0)) for run in cells] for name, cells in runs.items()}
    report = byte_bar.report(given, outcome)
    assert "Not to be compared with the public bar" in report.markdown()
    assert [label for label, _ in report.plot.lines] == ["HOPE"] * 3


def test_local_text_has_a_source_per_format(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.jsonl").write_text('{"text": "more text"}')
    sources = byte_bar.local(str(tmp_path), 2)
    assert [(s.name, s.kind, s.weight) for s in sources] == [("text2", "text", 4), ("jsonl2", "jsonl", 21)]
    with pytest.raises(FileNotFoundError, match="--text .*no .txt, .jsonl or .parquet file there"):
        byte_bar.local(str(tmp_path / "*.pdf"), 0)


def test_a_scale_outside_its_range_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must be in \(0, 1\], got 2"):
        options("--scale 2")


def test_seconds_are_those_of_the_steps() -> None:
    rows = [
        {"step": 1, "tokens": 100, "tokens_per_second": 50},
        {"step": 10, "tokens": 1000, "tokens_per_second": 300},
    ]
    assert byte_card.seconds(rows) == pytest.approx(2 + 3)


def test_a_card_says_what_the_run_has_measured_and_nothing_else() -> None:
    _, runs, _ = plans("--lrs 1e-3 --models hope")
    run = runs["hope"][0]
    record = {**result(run, 1.2345), "steps": 9, "low": None, "high": None}
    counts = {"documents": 1111, "bytes": 2222}
    manifest = {"sources": {"fineweb_edu": {"splits": {"train": counts, "valid": counts}}}}
    text = byte_card.card(run.config, run.label, record, "1.0", manifest)
    assert "**1.2345 bits per byte** on 7 windows" in text and "12 seconds of training on a GPU" in text
    assert (
        "HuggingFaceFW/fineweb-edu (sample-10BT)" in text
        and "first 90,000" in text
        and "1,111 / 2,222" in text
    )
    assert "1.721" not in text and "e" * 64 in text and "f" * 64 in text


def test_processes_take_gpus_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    used = torch.device("cuda")
    monkeypatch.setattr(byte_bar, "used_device", lambda: used)
    assert byte_bar.own_device() == "cuda"  # not in a process of its own
    monkeypatch.setattr(byte_bar, "parent_process", lambda: object())
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    found = []
    for number in (1, 2, 3):
        name = f"SpawnProcess-{number}"
        monkeypatch.setattr(byte_bar, "current_process", lambda name=name: type("P", (), {"name": name}))
        found.append(byte_bar.own_device())
    assert found == ["cuda:0", "cuda:1", "cuda:0"]


@pytest.mark.slow
def test_a_thousandth_of_the_size_runs_from_text_to_cards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Interrupted in the middle, it goes on from the checkpoint; what is finished is not run again."""
    line = "nl byte-bar --scale 0.001 --text bundled --seeds 0 --lrs 2e-3 4e-3 --jobs 1 --workers 0"
    monkeypatch.setattr("sys.argv", [*line.split(), "--device", "cpu", "--output", str(tmp_path)])
    update = trainer.Trainer.update

    def stop_at_step_9(self: trainer.Trainer, tokens: Any) -> Any:
        if self.step == 9 and not (tmp_path / "stopped").exists():
            (tmp_path / "stopped").touch()
            os.kill(os.getpid(), signal.SIGINT)
        return update(self, tokens)

    monkeypatch.setattr(trainer.Trainer, "update", stop_at_step_9)
    assert main() == 130
    assert "interrupted and saved at step 10" in capsys.readouterr().out
    assert main() == 0
    said = capsys.readouterr().out
    assert re.search(r"resumed from .*hope-.* at step 10", said)

    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [row["model"] for row in rows[:3]] == ["hope", "transformer", "gated_delta"]
    assert all(2 < row["bits_per_byte"][0] < 7 for row in rows[:3]), rows[:3]
    assert len({row["runs"][0]["sha256"] for row in rows[:3]}) == 1
    assert len({row["runs"][0]["text"] for row in rows[:3]}) == 1
    assert (tmp_path / "results.png").stat().st_size > 10_000
    for row in rows[:3]:
        [folder] = (tmp_path / "runs").glob(f"{row['model']}-*-seed0")
        assert {"README.md", "loss.png", "metrics.jsonl", "weights.safetensors"} <= set(os.listdir(folder))
        assert f"**{row['bits_per_byte'][0]:.4f} bits per byte**" in (folder / "README.md").read_text()
        assert (
            sum(p.numel() for p in load(folder / "weights.safetensors").model.parameters())
            == row["parameters"]
        )

    monkeypatch.setattr(byte_bar, "launch", lambda config: pytest.fail(f"{config.name} is run again"))
    assert main() == 0
