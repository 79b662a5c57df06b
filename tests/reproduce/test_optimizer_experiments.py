"""Fig. 4, orthogonal tasks, AdamW against Muon and M3: known numbers; cells are the numbers of runs."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from nested_learning.commands.reproduce import parser
from nested_learning.optim import DeltaMomentum, group_names
from nested_learning.optim.config import OptimConfig
from nested_learning.reproduce import fig4, optimizers, orthogonal
from nested_learning.reproduce.digits import DigitsRun, TinyViT, digits, to_patches
from nested_learning.reproduce.fig4 import METHODS, REFERENCE, START, ValleyRun, valley
from nested_learning.reproduce.orthogonal import OrthogonalRun, best_lr
from nested_learning.reproduce.tasks import TextRun


def ticks():
    counted = []
    return counted, counted.append


def options_of(line: str):
    return parser().parse_args(line.split())


def outcome_of(options, make):
    plan = options.experiment.prepare(options)
    tuned = {label: [(run, make(run)) for run in runs] for label, runs in plan.items()}
    (follow_up,) = options.experiment.follow_ups
    final = follow_up(options, tuned)
    return {label: [(run, make(run)) for run in runs] for label, runs in final.items()}


def test_the_gradient_of_the_valley_is_its_derivative():
    point = torch.tensor([[[-3.5, 2.0]], [[0.7, -0.2]]], dtype=torch.float64, requires_grad=True)
    constants = {"k": 10.0, "omega": 2.0, "a": 0.7}
    height, gradient = valley(point, **{name: torch.tensor(v) for name, v in constants.items()})
    (expected,) = torch.autograd.grad(height.sum(), point)
    torch.testing.assert_close(gradient, expected)
    r, theta = START
    off = r - theta + 0.7 * torch.sin(torch.tensor(2.0 * r, dtype=torch.float64))
    assert height[0].item() == pytest.approx(float(r**2 + 10 * off**2))


@pytest.mark.parametrize("method, steps", [("momentum", 670), ("delta, capped", 719)])
def test_known_step_counts_of_an_independent_check(method, steps):
    result = ValleyRun(options=METHODS[method], settings=(REFERENCE,), steps=1000).run(lambda n: None)
    assert result["solved"] == [steps] and result["diverged"] == [None]


def test_the_printed_coefficient_diverges_in_three_steps():
    for method in ("delta, as printed", "delta, as printed, ggᵀ"):
        result = ValleyRun(options=METHODS[method], settings=fig4.grid(), steps=30).run(lambda n: None)
        assert result["diverged"][0] == 3 and not any(result["solved"])


@pytest.mark.parametrize("method", ["momentum", "delta, capped", "delta, normalized"])
def test_settings_run_together_go_the_way_of_the_optimizer(method):
    other = {"k": 3.0, "omega": 1.0, "a": 0.5, "lr": 0.01, "momentum": 0.8}
    p = nn.Parameter(torch.tensor(START, dtype=torch.float64))
    optimizer = DeltaMomentum([p], lr=other["lr"], momentum=other["momentum"], **METHODS[method])
    path = [list(START)]
    for _ in range(40):
        optimizer.zero_grad()
        terrain = {name: torch.tensor(other[name]) for name in ("k", "omega", "a")}
        valley(p[None, None], **terrain)[0].sum().backward()
        optimizer.step()
        path.append(p.tolist())
    both = ValleyRun(options=METHODS[method], settings=(other, REFERENCE), steps=40).run(lambda n: None)
    torch.testing.assert_close(torch.tensor(both["path"]), torch.tensor(path))
    assert both["overshoot"][0] == pytest.approx(max(0.0, *(r for r, _ in path)))


def test_fig4_compares_where_both_get_there():
    options = options_of("fig4")
    count = len(fig4.grid())
    made = {
        "momentum": {"solved": [100] * count, "overshoot": [2.0] * count},
        "delta, capped": {"solved": [90, 50, None] + [200] * (count - 3), "overshoot": [1.0] * count},
    }
    outcome = {
        name: [(None, {"diverged": [None] * count, "path": [list(START)], **result})]
        for name, result in made.items()
    }
    row = fig4.report(options, outcome).numbers[1]
    assert (row["reference_steps"], row["settings"], row["solved"]) == (90, 162, 161)
    assert (row["compared"], row["faster"], row["steps_ratio"]) == (161, 1, 2.0)
    assert (row["less_overshoot"], row["overshoot_ratio"]) == (161, 0.5)


def test_plain_gradient_steps_forget_nothing_and_adam_does():
    counted, tick = ticks()
    run = OrthogonalRun(optimizer="SGD", lr=0.5, seed=0, steps_per_task=40)
    losses = torch.tensor(run.run(tick)["losses"])
    assert sum(counted) == run.steps == 240
    learned = losses.diagonal()
    assert learned.max() < 1e-3
    torch.testing.assert_close(losses.tril(), losses.tril().diagonal().expand(6, 6).tril(), rtol=0, atol=1e-6)
    torch.testing.assert_close(losses.triu(1), torch.ones(6, 6).triu(1), rtol=0, atol=1e-5)  # nor learn ahead
    adam = torch.tensor(replace(run, optimizer="Adam", lr=0.05).run(tick)["losses"])
    assert adam[-1, :-1].mean() > 2 * adam.diagonal()[:-1].mean()


def test_orthogonal_rows_use_the_best_rate_and_all_seeds():
    options = options_of("orthogonal --lrs 0.1 0.2 0.3 --seeds 0 1")

    def make(run):
        final = None if run.lr == 0.1 else run.lr
        start = 0.5 + run.seed if run.seed < 100 else 0.0
        return {"final": final, "losses": [[start] * 6] * 5 + [[2 * start] * 6]}

    outcome = outcome_of(options, make)
    assert {(run.lr, run.seed) for cells in outcome.values() for run, _ in cells} == {(0.2, 0), (0.2, 1)}
    row = orthogonal.report(options, outcome).numbers[0]
    assert row["learned"] == pytest.approx([0.5 * 7 / 6, 1.5 * 7 / 6])
    assert row["end"] == [1.0, 3.0] and row["forgotten"] == pytest.approx(2 - 7 / 6)
    with pytest.raises(ValueError, match=r"no learning rate of 0\.1 gave a finite loss"):
        best_lr([0.1], [{"final": None}])


def test_patches_are_read_row_by_row():
    image = torch.arange(64.0).view(1, 8, 8)
    patches = to_patches(image)
    assert patches.shape == (1, 16, 4)
    assert patches[0, 1].tolist() == [2, 3, 10, 11] and patches[0, 4].tolist() == [16, 17, 24, 25]


def test_digits_parts_are_apart_and_positions_are_no_matrices():
    parts = digits()
    assert [len(images) for images, _ in parts] == [1200, 297, 300]
    flat = torch.cat([images.flatten(1) for images, _ in parts])
    assert flat.unique(dim=0).shape[0] == 1797 and flat.min() >= 0 and flat.max() == 1
    kinds = group_names(TinyViT())
    assert kinds["embedding"] == ["position.weight"] and kinds["head"] == ["head.weight"]
    assert len(kinds["matrix"]) == 1 + 4 * 4


def test_a_short_run_on_digits_learns():
    counted, tick = ticks()
    optim = OptimConfig(name="m3", lr=1e-2, warmup_steps=2)
    result = DigitsRun(optim=optim, steps=25, eval_every=25).run(tick)
    assert sum(counted) == 25 and result["curve"][-1] == (25, result["final"])
    assert result["final"] < 1.9 and result["accuracy"] > 0.3  # chance: 2.30 and 0.1


@pytest.mark.thorough
def test_optimizers_are_tuned_on_their_own_seed_and_compared_with_adamw():
    options = options_of("optimizers --tasks text --seeds 3 4 --text-lrs 0.1 0.2 0.3")
    plan = options.experiment.prepare(options)
    runs = [run for cells in plan.values() for run in cells]
    assert list(plan) == ["text | adamw", "text | muon", "text | m3"]
    assert {run.seed for run in runs} == {100} and all(isinstance(run, TextRun) for run in runs)
    assert [run.optim.lr for run in plan["text | m3"]] == [0.1, 0.2, 0.3]
    best = {"adamw": 0.1, "muon": 0.2, "m3": 0.3}

    def make(run):
        final = abs(run.optim.lr - best[run.optim.name]) + 3.0 - 0.5 * (run.optim.name == "muon")
        curve = [(100, 3.0 if run.seed == 3 else 4.0), (300, final)]
        return {"final": final, "curve": curve, "seconds": 1.0 + 0.5 * (run.optim.name == "m3"), "steps": 300}

    outcome = outcome_of(options, make)
    assert {run.optim.name: run.optim.lr for cells in outcome.values() for run, _ in cells} == best
    rows = optimizers.report(options, outcome).rows
    assert rows[0][:4] == ["text", "adamw", "0.1 (edge)", "3.0000 ± 0.0000"]
    assert rows[1][2:4] == ["0.2", "2.5000 ± 0.0000"]
    assert rows[1][5:] == ["100, 300", "67%", "1.00 x"] and rows[2][-1] == "1.50 x"


def test_settings_stand_behind_the_name_of_an_optimizer():
    optim = optimizers.optim_of("m3 m3.slow_weight=0.2 adamw_lr_scale=0.5", 0.01)
    assert (optim.name, optim.lr, optim.m3.slow_weight, optim.adamw_lr_scale) == ("m3", 0.01, 0.2, 0.5)
    assert optim.m3.slow_every == optimizers.optim_of("m3", 0.01).m3.slow_every
    for wrong, message in (
        ("m3 m3.slow=1", "Key 'slow' not in 'M3Config'"),
        ("m4", "optim.name must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            optimizers.optim_of(wrong, 0.01)


def test_quick_runs_write_all_three_pictures(tmp_path, capsys):
    for name in ("fig4", "orthogonal"):
        options = options_of(f"{name} --quick --jobs 1 --output {tmp_path / name}")
        report = options.experiment.run(options, options.experiment.prepare(options))
        assert (tmp_path / name / "results.png").read_bytes().startswith(b"\x89PNG")
        written = json.loads((tmp_path / name / "results.json").read_text())
        assert len(written["rows"]) == len(report.rows) > 5
        assert report.markdown() in capsys.readouterr().out
