"""MAD and multi-query recall: their models, the search for learning rates, and the cells of their tables."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nested_learning.commands.reproduce import parser
from nested_learning.data.synthetic.mad import TASKS
from nested_learning.models.bill import count_parameters
from nested_learning.models.config import HopeConfig
from nested_learning.models.lm import HopeLM
from nested_learning.reproduce import mad, mqar, text, tuning
from nested_learning.reproduce.contenders import CONTENDERS, state_size
from nested_learning.reproduce.experiment import Outcome, Plan
from nested_learning.reproduce.mad import Compressor, MadRun, slowness
from nested_learning.reproduce.tasks import RecallRun

TINY = HopeConfig(vocab_size=16, dim=8, num_layers=1, num_heads=2, chunk_size=4, mixer="titans")


def options_of(line: str) -> argparse.Namespace:
    return parser().parse_args(line.split())


def result(final: float, steps: int = 100, **more: Any) -> dict[str, Any]:
    base = {"parameters": 1234, "solved": None, "step_seconds": 0.5, "seconds": 60.0, "nonfinite": 0}
    return {**base, "final": final, "steps": steps, "curve": [(10, final)], **more}


def invented(options: argparse.Namespace, make: Any) -> Outcome:
    """What all steps of an experiment plan, with the results that `make` invents."""

    def cells(plan: Plan) -> Outcome:
        return {label: [(run, make(run)) for run in runs] for label, runs in plan.items()}

    experiment = options.experiment
    outcome = cells(experiment.prepare(options))
    for follow_up in experiment.follow_ups:
        outcome |= cells(follow_up(options, outcome))
    return outcome


# learning rates


def chosen(losses: dict[float, float]) -> Outcome:
    """A search among three rates, two times wider, then seeds 3 and 4."""

    def runs(row: str, lr: float, seed: int) -> list[Any]:
        return [argparse.Namespace(optim=argparse.Namespace(lr=lr), seed=seed)]

    def cells(plan: Plan) -> Outcome:
        return {k: [(run, {"final": losses[run.optim.lr]}) for run in v] for k, v in plan.items()}  # type: ignore[attr-defined]

    outcome = cells(tuning.search(["a"], (1.5e-3, 3e-3, 6e-3), runs))
    for _ in range(2):
        outcome |= cells(tuning.widen(outcome, runs))
    return outcome | cells(tuning.final(outcome, runs, [3, 4]))


def test_the_search_has_a_seed_of_its_own_and_the_table_the_best_rate() -> None:
    outcome = chosen({1.5e-3: 2.0, 3e-3: 1.0, 6e-3: 3.0})
    tried = [(run.optim.lr, run.seed) for run, _ in outcome["search | a"]]
    assert tried == [(rate, 100) for rate in (1.5e-3, 3e-3, 6e-3)]
    assert [(run.optim.lr, run.seed) for run, _ in outcome["a"]] == [(3e-3, 3), (3e-3, 4)]
    assert list(tuning.final_outcome(outcome)) == ["a"] and len(outcome) == 2


def test_a_grid_grows_while_its_edge_is_best() -> None:
    up = chosen({1.5e-3: 3.0, 3e-3: 2.0, 6e-3: 1.5, 1.2e-2: 1.0, 2.4e-2: 4.0})
    assert list(up) == ["search | a", "search | a | 0.012", "search | a | 0.024", "a"]
    assert up["a"][0][0].optim.lr == 1.2e-2
    down = chosen({1.5e-3: 1.0, 3e-3: 2.0, 6e-3: 2.5, 7.5e-4: 1.5})
    assert tuning.rates_of(tuning.searched(down)["a"]) == [7.5e-4, 1.5e-3, 3e-3, 6e-3]
    assert down["a"][0][0].optim.lr == 1.5e-3


def test_text_without_a_transformer_has_a_table() -> None:
    options = options_of("text --models titans --seeds 3 4 --dim 16 --layers 1 --lrs 0.003")
    rest = {"by_position": [1.0] * 8, "shifted": None, "bytes_per_token": 2.0, "unigram_entropy": 5.0}
    report = text.report(options, invented(options, lambda run: result(4.0, **rest)))
    assert [row[5:7] for row in report.rows] == [["-", "-"]]
    assert report.numbers[0]["lrs"] == [3e-3] and report.numbers[0]["seeds"] == [3, 4]
    over_tokens, over_seconds = report.plot
    assert over_tokens.lines[0] == ("Titans", [(10 * 8 * 256, 4.0)])
    assert over_seconds.lines[0] == ("Titans", [(10 * 0.5, 4.0)])


@pytest.mark.parametrize(("losses", "shown"), [([3.0, 5.0], "4.0000"), ([None, 5.0], "not finite")])
def test_the_loss_on_another_text_has_a_column_also_if_it_is_not_finite(
    losses: list[float | None], shown: str
) -> None:
    options = options_of("text --shift bundled --data bytes --models titans --seeds 3 --dim 16 --lrs 0.003")
    rest = {"by_position": [1.0] * 8, "shifted": losses, "bytes_per_token": 1.0, "unigram_entropy": 3.0}
    report = text.report(options, invented(options, lambda run: result(4.0, **rest)))
    assert [dict(zip(report.header, row, strict=True))["other text"] for row in report.rows] == [shown]


def test_a_trained_model_reads_another_text_in_the_same_tokens(tmp_path: Path) -> None:
    """Its own text, put as another one, has the same loss; one of other letters has a higher one."""
    own, other = tmp_path / "own.txt", tmp_path / "other.txt"
    own.write_text("to be or not to be, that is the question.\n" * 400)
    other.write_text("WHY SO SAD? 1234567890 ZZZ QQQ\n" * 400)
    line = f"text --text {own} --quick --data bytes data.cache_dir={tmp_path}"
    options = options_of(line)
    options.experiment.prepare(options)
    base = replace(text.base_of(options).run, steps=30, eval_every=30)

    def losses(*files: Path) -> dict[str, Any]:
        run = replace(base, shift=tuple(map(str, files)), model=base.model)
        return run.run(lambda steps: None)

    same, shifted, without = losses(own), losses(other), losses()
    assert same["shifted"] == same["by_position"] == without["by_position"]
    assert without["shifted"] is None and shifted["final"] == same["final"]
    assert min(shifted["shifted"]) > max(same["shifted"]) + 0.5


def test_rates_are_compared_by_their_mean_and_one_without_a_finite_loss_never_wins() -> None:
    def cells(*losses: tuple[float, float | None]) -> tuning.Cells:
        made = []
        for rate, loss in losses:
            run = argparse.Namespace(optim=argparse.Namespace(lr=rate))
            made.append((run, {"final": loss}))
        return made

    assert tuning.best_rate(cells((0.1, 0.0), (0.1, 4.0), (0.2, 1.5), (0.2, 1.7))) == 0.2
    assert tuning.best_rate(cells((0.1, 0.0), (0.1, None), (0.2, 9.0))) == 0.2
    assert not tuning.at_edge(cells((0.1, 1.0)), 0.1) and tuning.at_edge(cells((0.1, 1.0), (0.2, 1.0)), 0.2)
    with pytest.raises(ValueError, match="no learning rate of 0.1 gave a finite loss"):
        tuning.best_rate(cells((0.1, None)))


def test_of_equal_accuracies_the_sooner_is_less_slow() -> None:
    run = MadRun(model=TINY, task="recall", steps=400)
    assert slowness(run, result(0.994, 100)) < slowness(run, result(0.992, 200))
    assert slowness(run, result(0.98, 400)) < slowness(run, result(0.96, 100))


# MAD


def test_mad_models_have_one_size_and_the_vocabulary_of_their_task() -> None:
    options = options_of("mad --models hope titans --dim 16")
    outcome = invented(options, lambda run: result(0.5))
    for task, known in TASKS.items():
        runs = [run for row in ("hope", "titans") for run, _ in outcome[row] if run.task == task]
        assert [run.seed for run in runs] == [0, 1, 2] * 2
        sizes = [count_parameters(run.model) for run in runs]
        assert max(sizes) - min(sizes) <= 2 * 3 * 8 * 16  # 8 more hidden units in every MLP
        assert {run.model.vocab_size for run in runs} == {known.settings.vocab_size}
        assert {run.model.chunk_size for run in runs} == {16}
    searched = [(run.task, run.optim.lr) for run, _ in outcome["search | hope"]]
    assert searched == [(task, lr) for lr in (3e-3, 6e-3, 1.2e-2) for task in ("recall", "copying")]
    assert outcome["titans"][0][0].model.read == "after_write"
    assert outcome["hope"][0][0].model.mixer == "self_mod"


def test_mad_searches_on_tasks_of_the_table_only() -> None:
    for asked, tasks in (("copying noisy", ["copying"]), ("fuzzy noisy", ["fuzzy"])):
        options = options_of(f"mad --models titans --lrs 0.01 0.02 --tasks {asked}")
        plan = options.experiment.prepare(options)
        assert [run.task for run in plan["search | titans"]] == 2 * tasks


def test_mad_cells_are_percents_and_their_average_by_seed() -> None:
    finals = {"recall": 1.0, "copying": 0.5, "fuzzy": 0.25}
    options = options_of("mad --models titans transformer --tasks recall copying fuzzy --seeds 0 1")
    best = {"titans": 6e-3, "transformer": 2.4e-2}

    def make(run: Any) -> dict[str, Any]:
        name = "titans" if run.model.mixer == "titans" else "transformer"
        if run.seed == 100:
            return result(0.9 - 10 * abs(run.optim.lr - best[name]))
        return result(finals[run.task] - 0.1 * run.seed * (run.task == "recall"), solved=30)

    report = mad.report(options, invented(options, make))
    assert report.header[4:] == ["average", "recall", "selective copying", "fuzzy recall"]
    assert [row[:2] for row in report.rows] == [["Titans", "1,234"], ["Transformer", "1,234"]]
    assert [row[3] for row in report.rows] == ["0.006", "0.024"]
    numbers = report.numbers[0]
    assert numbers["average"] == pytest.approx([1.75 / 3, 1.65 / 3])
    assert numbers["accuracy"] == {"recall": [1.0, 0.9], "copying": [0.5, 0.5], "fuzzy": [0.25, 0.25]}
    assert report.rows[0][4].startswith("56.7 ±") and report.rows[0][5] == "95.0 ± 63.5"
    assert report.rows[0][6:] == ["50.0 ± 0.0", "25.0 ± 0.0"]
    assert report.numbers[1]["lrs"] == [3e-3, 6e-3, 1.2e-2, 2.4e-2, 4.8e-2]
    assert numbers["solved_at"]["fuzzy"] == [30, 30]


def test_a_compressor_answers_from_its_last_output_alone() -> None:
    torch.manual_seed(0)
    model = Compressor(TINY, 12)
    tokens = torch.randint(15, (3, 12))
    logits, _ = model(tokens)
    held = model.encoder(tokens)[0]
    assert held.shape == (3, 12, 8) and logits.shape == (3, 12, 16)
    answer = model.decoder[-2]
    hidden = model.decoder[:-2](held[:, -1])
    for t in range(12):
        rows = slice(16 * t, 16 * t + 16)
        torch.testing.assert_close(logits[:, t], hidden @ answer.weight[rows].mT + answer.bias[rows])
    logits.sum().backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is not None for name, p in model.named_parameters())


def test_compression_and_only_it_has_a_decoder() -> None:
    assert isinstance(MadRun(model=TINY, task="compression").build(), Compressor)
    assert isinstance(MadRun(model=TINY, task="recall").build(), HopeLM)


def test_a_run_of_every_task_gives_a_share(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, task in TASKS.items():
        model = HopeConfig.from_dict(TINY.to_dict() | {"vocab_size": task.settings.vocab_size})
        run = MadRun(model=model, task=name, steps=1, batch_size=2, eval_batches=1)
        found = run.run(lambda steps: None)
        assert 0 <= found["final"] <= 1 and found["steps"] == 1
        json.dumps(found, allow_nan=False)


# multi-query recall


def test_mqar_settings_are_all_combinations_and_the_first_chooses_the_rates() -> None:
    options = options_of("mqar --pairs 4 8 --dims 16 32 --models titans transformer --seeds 5")
    outcome = invented(options, lambda run: result(0.5))
    runs = [run for run, _ in outcome["transformer"]]
    assert [(run.model.dim, run.pairs, run.overwritten) for run in runs] == [
        (dim, pairs, twice) for dim in (16, 32) for pairs in (4, 8) for twice in (0, pairs // 2)
    ]
    assert {run.steps for run in runs} == {2000} and {run.steps for run, _ in outcome["titans"]} == {500}
    assert {run.eval_every for _, cells in outcome.items() for run, _ in cells} == {25}
    searched = outcome["search | titans"]
    assert {(run.model.dim, run.pairs, run.overwritten, run.seed) for run, _ in searched} == {(16, 4, 0, 100)}
    for dim in (16, 32):
        models = [run.model for row in ("titans", "transformer") for run, _ in outcome[row]]
        sizes = {count_parameters(model) for model in models if model.dim == dim}
        assert max(sizes) - min(sizes) <= 2 * 3 * 8 * dim


def test_mqar_cells_are_those_of_their_setting() -> None:
    def make(run: RecallRun) -> dict[str, Any]:
        final = 0.1 + 0.2 * (run.pairs == 8) + 0.05 * run.overwritten + 0.01 * (run.model.mixer == "titans")
        return result(final, solved=50 if run.seed == 0 else None)

    options = options_of("mqar --dims 32 --pairs 4 8 --models titans transformer --seeds 0 1")
    report = mqar.report(options, invented(options, make))
    assert report.header[6:] == ["0% twice", "0.95 at step", "50% twice", "0.95 at step"]
    assert [row[1:3] for row in report.rows] == [
        ["4", "Titans"],
        ["4", "Transformer"],
        ["8", "Titans"],
        ["8", "Transformer"],
    ]
    assert [row[6][:5] for row in report.rows] == ["0.110", "0.100", "0.310", "0.300"]
    assert [row[8][:5] for row in report.rows] == ["0.210", "0.200", "0.510", "0.500"]
    assert {row[7] for row in report.rows} == {"50, -"}
    state = {(cell["pairs"], cell["model"], cell["overwritten"]): cell["state"] for cell in report.numbers}
    assert state[4, "Transformer", 0] == 2 * 32 * 16 * 2 and state[8, "Transformer", 4] == 2 * 32 * 40 * 2
    assert report.rows[3][4] == f"{2 * 32 * 40 * 2:,}"
    titans = CONTENDERS["titans"].build(HopeConfig(dim=32, num_layers=2, num_heads=2))
    assert state[4, "Titans", 0] == state[8, "Titans", 4] == state_size(titans, 0)


def test_shares_of_overwritten_keys_that_cannot_be() -> None:
    options = options_of("mqar --overwritten 1.5")
    with pytest.raises(ValueError, match=r"overwritten must be in \[0, 1\], got 1.5"):
        options.experiment.prepare(options)


@pytest.mark.parametrize(("name", "runs"), [("mad", 6), ("mqar", 4)])
def test_the_commands_write_table_and_picture(name: str, runs: int, tmp_path: Path) -> None:
    options = options_of(f"{name} --quick --jobs 1 --output {tmp_path}")
    report = options.experiment.run(options, options.experiment.prepare(options))
    assert len((tmp_path / "runs.jsonl").read_text().splitlines()) == runs
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["rows"] == json.loads(json.dumps(report.numbers))
