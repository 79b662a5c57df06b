"""The benchmark on a card, without one: its stages on the CPU, and kernels that are invented."""

from __future__ import annotations

import gc
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nested_learning.bench import gpu_kernels, gpu_speed
from nested_learning.bench.gpu import count_kernels, forecast
from nested_learning.bench.gpu_kernels import check_apart, check_module, distrust, key_of
from nested_learning.bench.gpu_pilot import make_plan, pilot_config, train_pilots
from nested_learning.bench.gpu_record import Budget, Record
from nested_learning.bench.gpu_report import markdown, write_report
from nested_learning.bench.gpu_settings import GpuSettings, Variant, build_variant, smoke_settings, variants
from nested_learning.bench.gpu_speed import Job, LostCardError, Speed, jobs, prepare
from nested_learning.bench.steps import training_step
from nested_learning.commands import nl
from nested_learning.ops import kernels
from nested_learning.train.config import RunConfig

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "bench" / "gpu.sh"
RULE = "nested_learning.ops.delta_rule.invented"
TRITON = Variant("linear", "triton", False, False)


def record_in(folder: Path, settings: GpuSettings | None = None) -> Record:
    used = settings or smoke_settings()
    about = {"settings": {"device": used.device}, "machine": {"processor": "none"}, "code": "0"}
    return Record(folder / "gpu.json", about)


def speed(folder: Path, seconds: float, settings: GpuSettings | None = None) -> Speed:
    used = settings or smoke_settings()
    return Speed(used, record_in(folder, used), Budget(seconds), folder, lambda message: None)


@pytest.fixture(autouse=True)
def quick() -> Iterator[None]:
    """The collections between two rounds do not look through everything that other tests have loaded."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def invented(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes a kernel module that finds these differences, or raises, on machines where Triton works."""

    def make(found: dict[str, float] | Exception) -> None:
        def compare(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
            if isinstance(found, Exception):
                raise found
            return found

        module = ModuleType(RULE)
        module.KERNEL = kernels.Kernel("invented", compare)  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, RULE, module)
        monkeypatch.setattr(kernels, "MODULES", (RULE,))
        monkeypatch.setattr(kernels, "why_no_triton", lambda device: None)

    return make


def checked(record: Record, *dtypes: str) -> None:
    for dtype in dtypes:
        record.put(key_of(RULE, dtype), **check_module(RULE, "cpu", dtype))


# Kernels


@pytest.mark.parametrize(
    ("found", "dtype", "why"),
    [
        ({"y": 9e-5, "d_k": 0.0}, "fp32", None),
        ({"y": 2e-2}, "bf16", None),
        ({"y": 2e-2}, "fp32", "y is off by 0.02"),
        ({"y": 1e-6, "d_k": 6e-2, "d_v": 7e-2}, "bf16", "d_v is off by 0.07"),
        ({"y": 1.0, "d_k": float("nan")}, "bf16", "d_k is off by nan"),
        ({}, "fp32", "it compared nothing"),
        (RuntimeError("an illegal\naccess"), "fp32", "RuntimeError: an illegal access"),
    ],
)
def test_a_kernel_is_right_or_it_is_said_why_not(
    invented: Any, found: Any, dtype: str, why: str | None
) -> None:
    invented(found)
    entry = check_module(RULE, "cpu", dtype)
    assert (entry["status"], entry.get("why")) == ("failed" if why else "done", why)


def test_a_model_is_trusted_when_all_its_kernels_are_right_in_both_types(
    invented: Any, tmp_path: Path
) -> None:
    invented({"y": 0.0})
    record = record_in(tmp_path)
    assert distrust("linear", record) == "delta_rule has not been checked in fp32"
    checked(record, "fp32")
    assert distrust("linear", record) == "delta_rule has not been checked in bf16"
    checked(record, "bf16")
    assert distrust("linear", record) is None and distrust("self_mod", record) is None
    invented({"y": 1e-3})
    checked(record, "fp32")
    assert distrust("linear", record) == "invented is wrong in fp32: y is off by 0.001"
    assert distrust("self_mod", record) is distrust("transformer", record) is distrust("fla", record) is None


def test_a_wrong_kernel_is_not_timed_and_the_other_way_is(
    invented: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    invented({"y": 1.0})
    measured = []

    def measure(self: Speed, job: Job) -> dict[str, Any]:
        measured.append((job.variant, kernels.chosen()))
        return {"seconds": [0.5], "ratio": {"min": 1, "median": 1, "max": 1}, "peak_bytes": 1, "flops": 1.0}

    monkeypatch.setattr(Speed, "_measure", measure)
    settings = smoke_settings()
    settings.models, settings.compile = ("linear",), True
    run = speed(tmp_path, 100, settings)
    checked(run.record, "fp32", "bf16")
    run.run()
    done = {(v.name, v.kernels, v.compiled): chosen for v, chosen in measured}
    plain = [(name, "torch", compiled) for name in ("transformer", "linear") for compiled in (True, False)]
    assert done == dict.fromkeys(plain, "torch") and kernels.chosen() == "auto"
    assert run.record.entries["train 64 linear (triton, compiled)"]["status"] == "unchecked"
    text = markdown(run.record)
    assert "RED: y is off by 1" in text
    rows = [line for line in text.splitlines() if "triton" in line]
    assert len(rows) == 6 and all("—" in row and "invented is wrong in fp32" in row for row in rows)

    invented({"y": 0.0})  # repaired: what was not measured is measured now, and nothing else
    checked(run.record, "fp32", "bf16")
    measured.clear()
    run.run()
    assert {(v.name, v.kernels) for v, _ in measured} == {("linear", "triton")}
    assert {chosen for _, chosen in measured} == {"auto"} and len(measured) == 6
    rows = [line for line in markdown(run.record).splitlines() if "triton" in line]
    assert rows and not any("wrong" in row for row in rows)


def test_a_speed_that_was_measured_is_hidden_when_its_kernel_turns_out_wrong(
    invented: Any, tmp_path: Path
) -> None:
    invented({"y": 0.0})
    run = speed(tmp_path, 100)
    checked(run.record, "fp32", "bf16")
    about = run._about(Job("train", 64, TRITON))
    spread = {"min": 1.5, "median": 1.5, "max": 1.5}
    run.record.put(
        "train 64 x", "done", **about, seconds=[0.5], ratio=spread, peak_bytes=12e6, flops=None, parameters=1
    )
    assert " 1.50 / 1.50 / 1.50 |" in markdown(run.record)
    invented({"y": 1.0})
    checked(run.record, "bf16")
    text = write_report(run.record, tmp_path)
    assert "1.50" not in text and "invented is wrong in bf16: y is off by 1" in text


@pytest.mark.thorough
def test_a_module_that_kills_its_process_is_wrong_and_keeps_what_it_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "deadly.py").write_text(
        "import os, torch\n"
        "from nested_learning.ops.kernels import Kernel\n"
        "KERNEL = Kernel('deadly', lambda d, t: {'y': 0.0} if t == torch.float32 else os._exit(7))\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT / "src")]))
    found = check_apart("deadly", "cpu", 60)
    assert found["fp32"]["status"] == "done" and found["bf16"]["status"] == "failed"
    assert "ended with code 7" in found["bf16"]["why"]


# Order, time and interruptions


def test_models_at_their_best_come_first_and_long_sequences_last(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = smoke_settings()
    settings.compile, settings.models = True, ("linear", "titans_pytorch")
    made = jobs(settings, frozenset({"linear"}))
    first, later = variants(settings, frozenset({"linear"}))
    assert [v.how for v in first] == ["torch, compiled", "triton, compiled", "own, compiled"]
    assert [v.how for v in later] == ["torch, compiled", "torch"]
    parts = [(job.part, job.length) for job in made if job.variant == first[1]]
    assert parts == [
        *[(part, length) for length in (64, 192) for part in ("train", "forward")],
    ]
    decoders = [
        Variant(name, how, False, False) for name, how in (("transformer", "torch"), ("linear", "triton"))
    ]
    decoding = [Job("decode", at, variant) for at in (10, 40) for variant in decoders]
    begin, end = made.index(Job("decode", 10, decoders[0])), made.index(Job("train", 64, later[0]))
    assert made[begin:end] == decoding
    assert [job.variant.how for job in made[end:] if job.part == "decode"] == ["torch", "torch"]


def test_only_the_parts_asked_for_are_timed() -> None:
    settings = smoke_settings()
    settings.models, settings.parts = ("linear",), ("forward", "decode")
    assert [(job.part, job.length) for job in jobs(settings, frozenset())] == [
        *(("forward", length) for length in (64, 192) for _ in range(2)),
        *(("decode", at) for at in (10, 40) for _ in range(2)),
    ]


def test_what_does_not_fit_is_skipped_and_measured_when_there_is_time(tmp_path: Path) -> None:
    settings = smoke_settings()
    settings.models, settings.lengths, settings.positions = ("linear",), (64,), (10,)
    speed(tmp_path, 0, settings).run()
    record = record_in(tmp_path, settings)
    kinds = {key: entry["status"] for key, entry in record.entries.items() if "rate" not in key}
    assert len(kinds) == 6 and set(kinds.values()) == {"skipped"}
    speed(tmp_path, 100, settings).run()
    record = record_in(tmp_path, settings)
    assert all(entry["status"] == "done" for entry in record.entries.values())
    before = (tmp_path / "gpu.json").read_text()
    speed(tmp_path, 100, settings).run()
    assert (tmp_path / "gpu.json").read_text() == before  # nothing is measured twice

    train = record.entries["train 64 linear (torch)"]
    plain = record.entries["train 64 transformer (torch)"]
    assert train["batch"] == 3 and train["tokens"] == 192 and len(train["seconds"]) == 2
    assert train["kernels_per_step"] > 2 * plain["kernels_per_step"] > 100
    assert plain["ratio"] == {"min": 1.0, "median": 1.0, "max": 1.0}
    assert record.entries["decode 10 linear (torch)"]["kernels_per_step"] < 150
    assert (tmp_path / "profile.txt").stat().st_size and (tmp_path / "trace.json.gz").stat().st_size


def test_a_length_is_expected_to_take_in_proportion_to_the_last_one(tmp_path: Path) -> None:
    run = speed(tmp_path, 100)
    job = Job("train", 192, Variant("linear", "torch", False, False))
    assert run.guess(job) == 0
    run.record.put("a", "done", **run._about(Job("train", 64, job.variant)), took=5.0)
    run.record.put("b", "done", **run._about(Job("forward", 64, job.variant)), took=50.0)
    assert run.guess(job) == 15
    clock = [0.0]
    run.budget = Budget(20, lambda: clock[0])
    assert run.budget.fits(run.guess(job))
    clock[0] = 6.0
    assert not run.budget.fits(run.guess(job)) and run._entry(job)["status"] == "skipped"


@pytest.mark.parametrize("words", ["CUDA error: an illegal memory access", "Triton Error [CUDA]: misaligned"])
def test_failures_are_results_and_a_lost_card_ends_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str
) -> None:
    lost = []

    def fail(settings: GpuSettings, job: Job) -> Any:
        if job.part == "forward":
            lost.append(words)
            raise RuntimeError(words)
        raise RuntimeError("CUDA out of memory")

    def release(settings: GpuSettings) -> None:
        assert not lost, "the card would refuse this, too"

    monkeypatch.setattr(gpu_speed, "prepare", fail)
    monkeypatch.setattr(gpu_speed, "release", release)
    run = speed(tmp_path, 100)
    with pytest.raises(LostCardError, match="forward 64 transformer") as raised:
        run.run()
    assert raised.value.exit_status == 3
    held = record_in(tmp_path)
    assert held.entries["train 64 transformer (torch)"]["why"] == "RuntimeError: CUDA out of memory"
    assert held.has("forward 64 transformer (torch)") and not held.has("forward 64 hope (torch)")
    assert words in markdown(held)


def test_graphs_hold_the_step_that_is_timed_without_them(monkeypatch: pytest.MonkeyPatch) -> None:
    settings, made = smoke_settings(), []

    class Step:
        """In the place of `CapturedStep`, which needs a card."""

        def __init__(self, model: nn.Module, loss: Any, example: tuple[Tensor, Tensor]) -> None:
            self.model, self.loss, self.example = model, loss, example
            made.append(self)

        def __call__(self, batch: tuple[Tensor, Tensor]) -> Tensor:
            self.model.zero_grad(set_to_none=True)
            value = self.loss(*batch)
            value.backward()
            return value

    class Forward(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model, self.grown = model, []
            made.append(self)

        def forward(self, tokens: Tensor) -> tuple[Tensor, None]:
            self.grown.append((tokens.shape, torch.is_grad_enabled()))
            return self.model(tokens)[0], None

    monkeypatch.setattr(gpu_speed, "CapturedStep", Step)
    monkeypatch.setattr(gpu_speed, "CapturedForward", Forward)
    captured, plain = (Variant("linear", "torch", False, graph) for graph in (True, False))
    ready = [prepare(settings, Job("train", 64, variant)) for variant in (captured, plain)]
    tokens, targets = made[0].example
    assert tokens.shape == targets.shape == (3, 64) and torch.equal(tokens[:, 1:], targets[:, :-1])
    ready[0].run()
    found = [p.grad for p in made[0].model.parameters()]
    model = build_variant(settings, "linear", 64)  # the same from the same seed
    training_step(model, settings.steps(), 3, 64)()
    for one, other in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(one, other.grad)
    assert ready[0].parameters == ready[1].parameters == sum(p.numel() for p in model.parameters())
    assert ready[0].peak_bytes is not None
    prepare(settings, Job("forward", 64, captured)).run()
    assert made[1].grown == [((3, 64), False)]


def test_a_measurement_in_which_two_processes_died_is_given_up(tmp_path: Path) -> None:
    assert record_in(tmp_path).begin("train x") and record_in(tmp_path).begin("train x")
    record = record_in(tmp_path)
    assert not record.has("train x")
    assert not record.begin("train x") and record.has("train x")


def test_results_of_other_code_or_settings_are_not_mixed(tmp_path: Path) -> None:
    Record(tmp_path / "gpu.json", {"code": "a", "machine": "b"}).save()
    with pytest.raises(ValueError, match="with other code; give another --output"):
        Record(tmp_path / "gpu.json", {"code": "c", "machine": "b"})


# Counts, forecasts and training runs


def test_counts_and_forecasts_stand_in_the_report(tmp_path: Path) -> None:
    settings, record = smoke_settings(), record_in(tmp_path)
    settings.models = ("linear",)
    count_kernels(settings, record, Budget(60), lambda message: None)
    forecast(settings, record)
    text = markdown(record)
    linear = record.entries["count linear torch"]
    assert f"{linear['forward'] + linear['backward']:,}" in text and "not measured" in text
    for part in ("train 64 3", "decode 10 16"):
        how = "tf32" if part.startswith("train") else "torch"
        assert record.entries[f"forecast {part} transformer {how}"]["ratio"] == 1


def test_the_two_runs_differ_in_the_model_only(tmp_path: Path) -> None:
    hope, plain = (pilot_config(smoke_settings(), name, tmp_path, 20) for name in ("hope", "transformer"))
    assert (hope.model.mixer, plain.model.mixer) == ("self_mod", "attention")
    assert len(hope.model.levels) == 3 and len(plain.model.levels) == 1
    assert (hope.train, hope.data, hope.optim, hope.seed) == (
        plain.train,
        plain.data,
        plain.optim,
        plain.seed,
    )
    assert hope.train.steps == 20 and hope.optim.warmup_steps == 2


@pytest.mark.parametrize(("found", "choice"), [(0.0, "auto"), (1.0, "torch")])
def test_no_run_is_made_on_a_wrong_kernel(
    invented: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found: float, choice: str
) -> None:
    chosen = []

    def train(config: RunConfig) -> dict[str, Any]:
        chosen.append(kernels.chosen())
        return {"status": "done", "curve": []}

    invented({"y": found})
    monkeypatch.setattr(gpu_kernels, "USERS", {"delta_rule": ("hope",)})
    monkeypatch.setattr("nested_learning.bench.gpu_pilot.train", train)
    record = record_in(tmp_path)
    checked(record, "fp32", "bf16")
    record.put("pilot plan", "done", steps=6)
    train_pilots(smoke_settings(), record, Budget(100), tmp_path, lambda message: None)
    assert chosen == [choice, choice] and kernels.chosen() == "auto"


def test_no_run_is_begun_without_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = smoke_settings()
    assert make_plan(settings, Budget(0), tmp_path)["status"] == "skipped"
    rows = [{"loss": 1.0, "seconds": 7.0}, {"valid_loss": 1.0, "seconds": 7.0}, {"loss": 1.0, "seconds": 9.0}]
    monkeypatch.setattr("nested_learning.bench.gpu_pilot.train", lambda config: {"curve": rows})
    still = lambda: 0.0  # noqa: E731
    planned = make_plan(settings, Budget(100, still), tmp_path)
    assert planned["step_seconds"] == 4 and planned["steps"] == 6  # of at most 6; there is time for 21
    settings.pilot_steps = 100
    assert make_plan(settings, Budget(100, still), tmp_path)["steps"] == 21
    assert "a step of both takes 4 s" in make_plan(settings, Budget(20, still), tmp_path)["why"]


def check_results(folder: Path) -> None:
    entries = json.loads((folder / "gpu.json").read_text())["entries"]
    assert {entry["status"] for entry in entries.values()} == {"done"}
    runs = [entries[f"pilot {name}"] for name in ("hope", "transformer")]
    assert [run["steps"] for run in runs] == [6, 6]
    tokens = [[row["tokens"] for row in run["curve"] if "loss" in row] for run in runs]
    assert tokens[0] == tokens[1] and tokens[0][-1] == 6 * 2 * 192
    seconds = [row["seconds"] for row in runs[0]["curve"]]
    assert seconds == sorted(seconds) and seconds[0] > 0
    text = (folder / "gpu.md").read_text()
    assert "Made without a card" in text and "| hope" in text
    titles = ("Training step", "Forward pass", "Decoding", "Training side by side", "Kernels of", "Forecast")
    assert all(f"\n## {title}" in text for title in titles)
    for name in ("gpu.png", "pilot.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    assert "Self CPU" in (folder / "profile.txt").read_text()


@pytest.mark.thorough
def test_everything_by_its_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["bench", "gpu", "--smoke", "--models", "hope", "--lengths", "64", "--output", str(tmp_path)]
    assert nl.main(command) == 0
    told = capsys.readouterr()
    assert told.out.strip() == (tmp_path / "gpu.md").read_text().strip()
    assert "train 64 hope (torch): done" in told.err
    check_results(tmp_path)
    assert nl.main(command) == 0  # from what is there
    again = capsys.readouterr()
    assert again.out == told.out and again.err.count("] ") == 1  # that no kernel can be checked
    assert nl.main([*command, "--repeats", "3"]) == 2
    assert "results with other settings; give another --output" in capsys.readouterr().err


@pytest.mark.slow
def test_everything_by_the_script_in_stages(tmp_path: Path) -> None:
    environment = {**os.environ, "RUN": "env", "OUTPUT": str(tmp_path), "PYTHONPATH": str(ROOT / "src")}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = ["bash", str(SCRIPT), "--smoke", "--models", "hope"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout == (tmp_path / "gpu.md").read_text()
    check_results(tmp_path)


@pytest.mark.parametrize(
    ("ends", "stages", "status"),
    [
        ("0 0 0 0", "kernels speed pilot counts", 0),
        ("0 1 0 0", "kernels speed pilot counts", 1),  # a measurement failed; the others are made
        ("0 3 139 0 0 0", "kernels speed speed speed pilot counts", 0),  # the card was lost, then a fault
        ("3 3 3 3 0 0 0", "kernels kernels kernels kernels speed pilot counts", 1),
        ("0 130", "kernels speed", 130),  # Ctrl-C
        ("2", "kernels", 2),  # a wrong option
    ],
)
def test_the_script_goes_on_after_faults(tmp_path: Path, ends: str, stages: str, status: int) -> None:
    (tmp_path / "gpu.md").write_text("a report\n")
    (tmp_path / "gpu.json").write_text("old")
    (tmp_path / "ends").write_text(ends)
    (tmp_path / "run").write_text(
        'cd "$(dirname "$0")"; echo "$@" >> calls; set -- $(cat ends); echo "${@:2}" > ends; exit "$1"\n'
    )
    environment = {**os.environ, "RUN": f"bash {tmp_path}/run", "OUTPUT": str(tmp_path), "MINUTES": "3"}
    command = ["bash", str(SCRIPT), "--again", "--models", "hope"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == status, done.stderr
    calls = (tmp_path / "calls").read_text().splitlines()
    assert [re.search(r"--stages (\w+)", call)[1] for call in calls] == stages.split()
    assert all(re.search(r"--minutes (2\.\d\d|3\.00) .*--models hope$", call) for call in calls)
    assert not (tmp_path / "gpu.json").exists() and "--again" not in calls[0]
    assert (done.stdout == "a report\n") == (status < 2)
