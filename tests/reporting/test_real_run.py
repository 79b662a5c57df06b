"""A run that was really trained, and its page in a browser."""

from __future__ import annotations

import base64
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from nested_learning.config import load_config
from nested_learning.reporting import run_report
from nested_learning.reporting.run import FINISHED, collect_run
from nested_learning.reporting.samples import write_samples
from nested_learning.train.checkpoint import CheckpointStore
from nested_learning.train.config import RunConfig
from nested_learning.train.launch import launch

WORDS = "It is a truth universally acknowledged, that a text must be in want of a reader. "
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HEADLESS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
)


def configured(folder: Path, steps: int) -> RunConfig:
    (folder / "text.txt").write_text(WORDS * 80)
    settings = {
        "data": "bytes",
        "data.files": f"[{folder / 'text.txt'}]",
        "data.cache_dir": folder / "cache",
        "model.dim": 16,
        "model.num_heads": 2,
        "model.num_layers": 1,
        "model.chunk_size": 8,
        "model.levels": "[{name: quick, chunk_size: 4, expansion: 1}]",
        "train.seq_len": 16,
        "train.batch_size": 2,
        "train.steps": steps,
        "train.compile": "false",
        "train.log_every": 1,
        "train.eval_every": 2,
        "train.save_every": 2,
        "train.eval_batches": 2,
        "train.sample_tokens": 8,
        "train.device": "cpu",
        "train.output_dir": folder / "out",
        "train.resume_with": "[train.steps]",
        "logging.progress": False,
    }
    return load_config("pilot_smoke", [f"{key}={value}" for key, value in settings.items()])


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps that was started twice."""
    folder = tmp_path_factory.mktemp("real")
    launch(configured(folder, 2))
    return launch(configured(folder, 4)).run_dir


def test_the_page_of_a_real_run(run_dir: Path) -> None:
    record = collect_run(run_dir)
    assert record.status == FINISHED and record.missing == []
    assert [start["step"] for start in record.starts] == [0, 2] and record.starts[1]["devices"] == 1
    page = run_report(run_dir)
    assert "in 2 starts" in page and "What was looked for and not found" not in page
    assert "<td>quick</td>" in page and "level/quick/change" in record.rows[-1]


def test_samples_are_those_of_the_run(run_dir: Path) -> None:
    record = collect_run(run_dir)
    samples = write_samples(record)
    assert [sample.step for sample in samples] == [2, 4]
    assert samples[1].text == (run_dir / "sample.txt").read_bytes().decode()


def test_a_damaged_checkpoint_is_named(run_dir: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run_dir, copy)
    (CheckpointStore(copy / "checkpoints", 2).folders()[0] / "run.pt").write_bytes(b"")
    first, second = write_samples(collect_run(copy))
    assert first.text is None and "run.pt has 0 bytes" in first.problem and second.text is not None


@pytest.mark.thorough
@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome is installed")
def test_a_browser_shows_every_picture(run_dir: Path, tmp_path: Path) -> None:
    """A script that is added to the page writes the natural width of every picture into its title."""
    page = run_report(run_dir, samples=False)
    widths = "document.title = [...document.images].map(i => i.naturalWidth).join(' ')"
    script = f"<script>window.onload = () => {{ {widths} }}</script></body>"
    (tmp_path / "page.html").write_text(page.replace("</body>", script))
    assert BROWSER is not None
    where = (tmp_path / "page.html").as_uri()
    command = [BROWSER, *HEADLESS, f"--user-data-dir={tmp_path / 'browser'}", "--dump-dom", where]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    title = re.search("<title>(.*?)</title>", shown)
    assert title is not None
    pictures = re.findall('data:image/png;base64,([^"]+)', page)
    expected = [int.from_bytes(base64.b64decode(one)[16:20], "big") for one in pictures]
    assert [int(width) for width in title[1].split()] == expected and len(expected) == 4
