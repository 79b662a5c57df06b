"""The whole benchmark on tiny models, through its command line."""

import json
import re
import runpy
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from nested_learning.bench.settings import BenchSettings

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench" / "speed.py"


def run(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *options], capture_output=True, text=True, check=False
    )


@pytest.mark.thorough
def test_smoke(tmp_path: Path):
    done = run("--smoke", "--skip-titans-pytorch", "--lengths", "32:3", "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "speed.json").read_text())
    rows = {(row["part"], row["name"], row["length"]): row for row in report["results"]}
    models = ("transformer", "self_mod")
    expected = {(part, name, 32) for part in ("train", "forward", "memory") for name in models}
    assert set(rows) == expected | {
        ("decode", "transformer", 10),
        ("decode", "self_mod", 10),
        ("decode", "self_mod", 50),
    }

    plain, memory = (rows["train", name, 32] for name in models)
    ratios = [a / b for a, b in zip(plain["seconds"], memory["seconds"], strict=True)]
    assert memory["ratio"]["median"] == pytest.approx(statistics.median(ratios))
    assert memory["tokens_per_second"]["max"] == pytest.approx(3 * 32 / min(memory["seconds"]))
    assert plain["state_floats"] == 2 * 32 * 32  # keys and values of 32 tokens, width 32, one layer
    assert rows["decode", "self_mod", 50]["ratio"] is None

    assert (tmp_path / "speed.md").read_text().strip() == done.stdout.strip()
    assert len(re.findall(r"(?m)^\| 32 +\| +3 \| +self_mod \| transformer \|", done.stdout)) == 3
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")
    assert "train T=32 batch=3: round 2/2 self_mod" in done.stderr


def test_a_wrong_option_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr("sys.argv", [str(SCRIPT), "--smoke", "--repeats", "0", "--output", "unused"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert stop.value.code == 2
    assert "bench.repeats must be at least 1, got 0" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"bench\.precision must be of fp32, bf16, got 'fp8'"):
        BenchSettings(precision="fp8")
