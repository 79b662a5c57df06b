"""What users of two other documents copy from there, a row each, and that it works here.

A is the README of an earlier reproduction of the paper, B a guide to getting started with the Continuum
Memory System. docs/migration.md is made of the same rows:

    uv run python tests/test_asked.py            # writes docs/migration.md
    uv run pytest -m slow tests/test_asked.py    # runs the rows that take minutes

Commands run as they are written there, in a folder of their own with small files under the same names; what
is made smaller besides stands beside the call.
"""

from __future__ import annotations

import io
import json
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import chdir, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hydra.core.global_hydra import GlobalHydra

from nested_learning.aliases import our_arguments, our_path
from nested_learning.config import load_config
from nested_learning.data.corpus import bundled_files
from nested_learning.eval.results import read_result
from nested_learning.train.metrics import read_metrics
from nested_learning.train.strategy import OneProcess
from nested_learning.train.trial import describe_trial, fit_trial, with_sample

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "migration.md"


@dataclass(frozen=True, kw_only=True)
class Row:
    """A name of theirs, ours ("" = the same), a note, and how to see that it works or why it is not run."""

    document: str
    theirs: str
    ours: str
    note: str
    check: Callable[[Home], None] | None
    tier: str
    struck: str


ROWS: list[Row] = []
Check = Callable[["Home"], None]


def row(
    document: str, theirs: str, ours: str = "", note: str = "", tier: str = ""
) -> Callable[[Check], Check]:
    """Add a row that the decorated function checks; `tier` is the mark of its test, "" = quick."""
    place = len(
        ROWS
    )  # decorators are made from the first to the last, but applied from the last to the first
    given = Row(document=document, theirs=theirs, ours=ours, note=note, check=None, tier=tier, struck="")
    ROWS.append(given)

    def add(check: Check) -> Check:
        ROWS[place] = replace(given, check=check)
        return check

    return add


def struck(document: str, theirs: str, reason: str, ours: str = "") -> None:
    """Add a row that cannot be run in a test."""
    ROWS.append(Row(document=document, theirs=theirs, ours=ours, note="", check=None, tier="", struck=reason))


# Where commands run

TINY = {"dim": 16, "num_heads": 2, "num_layers": 1, "chunk_size": 8, "levels": [{"name": "mlp"}]}
PIECES = 400
SMALL = (
    "levels=mlp model.dim=16 model.num_heads=2 model.num_layers=1 model.chunk_size=8 train.seq_len=64 "
    "train.batch_size=2 train.accumulation=1 train.precision=fp32 train.eval_batches=1 train.sample_tokens=0 "
    f"train.device=cpu optim.warmup_steps=1 data.tokenizer.vocab_size={PIECES} logging.progress=false "
)


class Home:
    """A folder with small files under the names of document A, where every command runs once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.outputs: dict[str, str] = {}
        self.passed: set[Check] = set()
        text = bundled_files()[0].read_text(encoding="utf-8")[:120_000]
        documents = [{"text": text[i : i + 1500]} for i in range(0, len(text), 1500)]
        (folder / "some.jsonl").write_text("".join(json.dumps(d) + "\n" for d in documents))
        (folder / "other.txt").write_text(text[:30_000])
        source = {"name": "some", "kind": "jsonl", "path": "some.jsonl"}
        for name in ("refinedweb_mixture", "refinedweb_mixture_filtered"):
            mixture = {"valid_share": 0.2, "sources": [source]}
            self.write(
                f"configs/data/{name}.yaml",
                {"shards": "outputs/data/sample", "tokenizer": {"vocab_size": PIECES}, "mixture": mixture},
            )
        segments = [{"name": name, "files": ["other.txt"]} for name in ("first", "second")]
        self.write(
            "configs/data/continual_segments_sample.yaml", {"valid_fraction": 0.2, "segments": segments}
        )
        for name in ("pilot", "mid"):
            entry: dict[str, Any] = {"defaults": ["run_schema", "_self_"], "name": name, "model": TINY}
            self.write(
                f"configs/{name}.yaml",
                {**entry, "data": {"tokenizer": {"vocab_size": PIECES}}, "train": {"seq_len": 64}},
            )

    def write(self, name: str, content: dict[str, Any]) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(content))

    def run(self, command: str, changes: dict[str, str] | None = None) -> str:
        """What a Python command prints, run in this process once, with some words of it replaced."""
        words = [(changes or {}).get(word, word) for word in shlex.split(command)]
        key = " ".join(words)
        if key not in self.outputs:
            script = next(i for i, word in enumerate(words) if word.endswith(".py"))
            self.outputs[key] = self._call(ROOT / words[script], words[script + 1 :])
        return self.outputs[key]

    def _call(self, script: Path, arguments: list[str]) -> str:
        printed, before = io.StringIO(), sys.argv
        GlobalHydra.instance().clear()
        sys.argv = [str(script), *arguments]
        try:
            with chdir(self.folder), redirect_stdout(printed), redirect_stderr(printed):
                runpy.run_path(str(script), run_name="__main__")
        except SystemExit as end:
            assert not end.code, printed.getvalue()
        finally:
            sys.argv = before
        return printed.getvalue()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Home(tmp_path_factory.mktemp("home"))
    torch.set_num_threads(before)


def shell(command: str, **environment: str) -> str:
    """What a command prints, run in the root of the repository."""
    done = subprocess.run(
        command,
        shell=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


# A: setup and checks

struck("A", "uv python install 3.12", "installs a Python; any of at least 3.11 will do")
struck(
    "A",
    "uv sync --all-extras",
    "installs everything, DeepSpeed included; `uv sync` is enough for all but that",
)
struck("A", "uv run pytest", "this is it")


@row("A", "uv run ruff check .")
def check_ruff(home: Home) -> None:
    shell(f"{sys.executable} -m ruff check .")


@row("A", "uv run mypy src", tier="slow")
def check_mypy(home: Home) -> None:
    shell(f"{sys.executable} -m mypy src")


# A: data

TOKENIZER = """uv run python scripts/data/train_tokenizer.py
 --manifest configs/data/refinedweb_mixture.yaml --vocab-size 32000
 --output-dir artifacts/tokenizer/refinedweb_mix --log-file data/mixtures/refinedweb_mix_tokenizer.json"""
MODEL = "artifacts/tokenizer/refinedweb_mix/spm_32000_unigram.model"
SHARDS = f"""uv run python scripts/data/process_mixture.py configs/data/refinedweb_mixture_filtered.yaml
 --tokenizer-path {MODEL} --log-file data/mixtures/refinedweb_mix_filtered_shards.json"""
OURS_MODEL = "artifacts/tokenizer/refinedweb_mix/tokenizer.model"


def tokenizer(home: Home) -> None:
    home.run(TOKENIZER, {"32000": str(PIECES)})


def shards(home: Home) -> None:
    tokenizer(home)
    home.run(SHARDS + " --workers 0")


@row("A", "scripts/data/train_tokenizer.py")
@row("A", "train_tokenizer.py --manifest configs/data/refinedweb_mixture.yaml", "", "needs the hub as it is")
@row("A", "train_tokenizer.py --vocab-size 32000")
@row("A", "train_tokenizer.py --output-dir artifacts/tokenizer/refinedweb_mix")
@row(
    "A",
    "train_tokenizer.py --log-file data/mixtures/refinedweb_mix_tokenizer.json",
    "",
    "lines, with the time",
)
def check_tokenizer(home: Home) -> None:
    tokenizer(home)
    assert (home.folder / OURS_MODEL).is_file()
    assert "pieces" in (home.folder / "data/mixtures/refinedweb_mix_tokenizer.json").read_text()


@row("A", MODEL, OURS_MODEL, "or that of `run_full.sh` or `run_sample.sh`, if only theirs is there")
@row(
    "A",
    "scripts/data/process_mixture.py configs/data/refinedweb_mixture_filtered.yaml",
    "",
    "needs the hub as it is",
)
@row("A", "process_mixture.py --tokenizer-path")
@row(
    "A",
    "process_mixture.py --log-file data/mixtures/refinedweb_mix_filtered_shards.json",
    "",
    "lines, with the time",
)
def check_shards(home: Home) -> None:
    shards(home)
    assert (home.folder / "outputs/data/sample/mixture.json").is_file()
    assert "complete" in (home.folder / "data/mixtures/refinedweb_mix_filtered_shards.json").read_text()
    with chdir(home.folder):
        assert our_path(MODEL) == OURS_MODEL


@row("A", "uv run bash scripts/data/run_sample.sh", "", "without a network: the bundled text", tier="slow")
def check_run_sample(home: Home) -> None:
    assert "all good" in shell("bash scripts/data/run_sample.sh", OFFLINE="1", RUN=f"env PATH={path()}")


@row(
    "A", "uv run bash scripts/data/run_full.sh", "", "needs the hub; the test reads the commands it would run"
)
@row(
    "A",
    "RW_LIMIT, WIKI_LIMIT, …",
    "RW_LIMIT, WIKI_LIMIT, C4_LIMIT, RPJ_LIMIT, CODE_LIMIT",
    "in records; default: all",
)
def check_run_full(home: Home) -> None:
    printed = shell("bash scripts/data/run_full.sh", RUN="echo", RW_LIMIT="7", WIKI_LIMIT="5")
    assert printed.count("--limit refinedweb=7 wikipedia=5") == 2


def path() -> str:
    """PATH with this Python first."""
    return f"{Path(sys.executable).parent}:{os.environ['PATH']}"


# A: training


@row("A", "uv run bash scripts/run_smoke.sh pilot")
@row("A", "uv run python train.py --config-name pilot_smoke")
def check_run_smoke(home: Home) -> None:
    assert (
        shell("bash scripts/run_smoke.sh pilot", RUN="echo") == "python train.py --config-name pilot_smoke\n"
    )
    shards(home)
    less = f"{SMALL} data.shards=outputs/data/sample train.steps=2"
    printed = home.run(f"uv run python train.py --config-name pilot_smoke {less}")
    assert "results in" in printed


@row("A", "uv run bash scripts/run_e2e_smoke.sh", tier="slow")
def check_end_to_end(home: Home) -> None:
    printed = shell("bash scripts/run_e2e_smoke.sh train.steps=20", RUN=f"env PATH={path()}")
    assert "/outputs/eval/e2e_smoke-" in printed.splitlines()[-1]
    assert all(evaluation in printed for evaluation in ("zeroshot.json", "niah", "continual"))


@row(
    "A",
    "train.py --config-name pilot (also mid, target), no data named",
    "",
    "the sample shards if they are there, with the vocabulary of the run, else the bundled text",
)
def check_no_data(home: Home) -> None:
    shards(home)
    printed = home.run(f"uv run python train.py --config-name pilot {SMALL} train.steps=2")
    assert "no data named: training on the sample shards in outputs/data/sample" in printed
    assert "20 each, Hoffmann et al., 2022" in printed and "on one H100" in printed
    assert [r["step"] for r in read_metrics(home.folder / "outputs/pilot/metrics.jsonl") if "loss" in r] == [
        1,
        2,
    ]


@row(
    "A",
    "uv run python train.py --config-name pilot",
    "",
    "on a CPU a step reads one row instead of 256, and a line says so",
    tier="slow",
)
def check_pilot(home: Home) -> None:
    command = [sys.executable, str(ROOT / "train.py"), "--config-name", "pilot"]
    log, metrics = home.folder / "pilot.log", home.folder / "configs" / "outputs/pilot/metrics.jsonl"
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=home.folder / "configs", stdout=file, stderr=file)
        deadline = time.monotonic() + 1200
        try:
            while not any(row["step"] == 1 for row in read_metrics(metrics)):
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(1)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()


def mid(home: Home) -> None:
    shards(home)
    steps = "train.steps=100 train.save_every=50 train.eval_every=100"
    home.run(f"uv run python train.py --config-name mid {SMALL} data.shards=outputs/data/sample {steps}")


def several(home: Home, command: str) -> None:
    shards(home)
    places = f"data.shards={home.folder}/outputs/data/sample train.output_dir={home.folder}/two"
    own = f"{SMALL} {places} train.steps=2 name={command.split()[2][:-3]}"
    assert "results in" in shell(f"{command} {own}", PATH=path())


@row("A", "torchrun --nproc_per_node=2 train_dist.py --config-name mid", tier="slow")
def check_dist(home: Home) -> None:
    several(home, "torchrun --nproc_per_node=2 train_dist.py --config-name mid")


@row("A", "torchrun --nproc_per_node=2 train_fsdp.py --config-name mid", tier="slow")
def check_fsdp(home: Home) -> None:
    several(home, "torchrun --nproc_per_node=2 train_fsdp.py --config-name mid")


struck(
    "A",
    "deepspeed --num_gpus=2 train_deepspeed.py --config-name target",
    "needs two GPUs and DeepSpeed, which is not installed by default",
    "torchrun --nproc-per-node 2 train_deepspeed.py --config-name target",
)


@row("A", "deepspeed.config=configs/deepspeed/zero3.json", "parallel.deepspeed=configs/deepspeed/zero3.json")
def check_deepspeed_config(home: Home) -> None:
    config = load_config("target", ["deepspeed.config=configs/deepspeed/zero3.json"])
    assert config.parallel.deepspeed == "configs/deepspeed/zero3.json"
    json.loads((ROOT / config.parallel.deepspeed).read_text())


@row("A", "--local_rank=N, added by the launcher `deepspeed`", "LOCAL_RANK", "set by both launchers")
def check_local_rank(home: Home) -> None:
    assert our_arguments(["--local_rank=1", "--config-name", "target"]) == ["--config-name", "target"]


# A: logging


@row("A", "logging.enabled=true", "logging.wandb=online", "W&B; `wandb=offline` needs no account")
@row("A", "logging.backend=wandb", "logging.wandb=online")
def check_wandb(home: Home) -> None:
    for words in (["logging.enabled=true"], ["logging.backend=wandb"]):
        assert load_config("pilot_smoke", words).logging.wandb == "online"
    off = ["logging.enabled=false", "logging.backend=wandb"]
    assert load_config("pilot_smoke", off).logging.wandb == "none"


@row("A", "logging.backend=json", "logging.wandb=none", "metrics are always in `outputs/NAME/metrics.jsonl`")
@row("A", "logging.path=logs/run.json", "", "one more copy of these lines: a JSON object in each")
def check_json(home: Home) -> None:
    shards(home)
    words = "logging.backend=json logging.path=logs/run.json logging.enabled=true"
    home.run(
        f"uv run python train.py {SMALL} data.shards=outputs/data/sample train.steps=3 name=logged {words}"
    )
    lines = read_metrics(home.folder / "logs/run.json")
    assert lines == read_metrics(home.folder / "outputs/logged/metrics.jsonl") and lines[-1]["step"] == 3
    assert load_config("pilot_smoke", words.split()).logging.wandb == "none"


# A: evaluation

LOCAL = f" --local-dir {ROOT}/tests/eval/data/zeroshot"
COMMON = (
    f"--config configs/hope/mid.yaml --checkpoint checkpoints/mid/step_000100.pt --tokenizer-path {MODEL}"
)
ZEROSHOT = f"""uv run python scripts/eval/zeroshot.py {COMMON}
 --tasks piqa,hellaswag,winogrande,arc_easy,arc_challenge,boolq,siqa --max-samples 200 --device cuda:0"""
QUICK = f"""uv run python scripts/eval/zeroshot.py --config configs/hope/pilot.yaml
 --checkpoint artifacts/examples/pilot_dummy.pt --tokenizer-path {MODEL}
 --tasks piqa --max-samples 32 --device cpu"""
NIAH = f"""uv run python scripts/eval/niah.py {COMMON}
 --context-lengths 2048 4096 8192 --samples-per-length 20"""
CONTINUAL = """uv run python scripts/eval/continual.py --config configs/hope/mid.yaml
 --checkpoints checkpoints/mid/step_000050.pt checkpoints/mid/step_000100.pt
 --segments-yaml configs/data/continual_segments_sample.yaml --batch-size 4 --max-batches 10"""


@row(
    "A",
    "artifacts/examples/pilot_dummy.pt",
    "--checkpoint untrained",
    "the weights that training of --config starts from",
)
@row(
    "A",
    "--config configs/hope/pilot.yaml",
    "--config configs/pilot.yaml",
    "a checkpoint holds its configuration: leave it out",
)
def check_quick(home: Home) -> None:
    tokenizer(home)
    printed = home.run(QUICK + LOCAL + " --output eval/quick.json", {"32": "2"})
    assert "artifacts/examples/pilot_dummy.pt is not there; taking untrained" in printed
    assert {m.task for m in read_result(home.folder / "eval/quick.json").metrics} >= {"piqa"}


@row("A", "scripts/eval/zeroshot.py", "", "the hub, or --local-dir FOLDER")
@row(
    "A",
    "--config configs/hope/mid.yaml",
    "--config configs/mid.yaml",
    "a checkpoint holds its configuration: leave it out",
)
@row(
    "A",
    "--checkpoint checkpoints/mid/step_000100.pt",
    "--checkpoint outputs/mid/checkpoints/step_00000100",
    "or `outputs/mid`: its latest; a folder, not a file",
)
@row("A", "--tokenizer-path", "", "a checkpoint holds its tokenizer: leave it out")
@row("A", "zeroshot.py --tasks piqa,hellaswag,winogrande,arc_easy,arc_challenge,boolq,siqa")
@row("A", "zeroshot.py --max-samples 200")
@row("A", "--device cuda:0", "", "or cpu, mps, auto; the test runs cpu")
@row(
    "A",
    "eval/: summaries and per-task JSON",
    "outputs/eval/NAME-HASH/zeroshot.json",
    "all tasks in one file; --output eval/x.json puts it there",
)
def check_zeroshot(home: Home) -> None:
    mid(home)
    home.run(ZEROSHOT + LOCAL + " --output eval/zeroshot.json", {"200": "2", "cuda:0": "cpu"})
    result = read_result(home.folder / "eval/zeroshot.json")
    assert {m.task for m in result.metrics} >= {"piqa", "hellaswag", "arc_challenge", "boolq", "siqa"}
    assert result.checkpoint["path"] == "outputs/mid/checkpoints/step_00000100"
    assert "piqa" in home.run("scripts/eval/summarise.py eval/zeroshot.json")


@row("A", "scripts/eval/niah.py")
@row("A", "niah.py --context-lengths 2048 4096 8192")
@row("A", "niah.py --samples-per-length 20")
def check_niah(home: Home) -> None:
    mid(home)
    less = " --tasks s1 --max-new-tokens 4 --output eval/niah.json"
    home.run(NIAH + less, {"2048": "1024", "4096": "1536", "8192": "2048", "20": "1"})
    assert len(read_result(home.folder / "eval/niah.json").metrics) >= 3


@row("A", "scripts/eval/continual.py")
@row(
    "A",
    "continual.py --checkpoints checkpoints/mid/step_000050.pt checkpoints/mid/step_000100.pt",
    "--checkpoints outputs/mid/checkpoints/step_00000050 …",
    "kept if `train.save_every` and `train.keep_last` say so",
)
@row("A", "continual.py --segments-yaml configs/data/continual_segments_sample.yaml")
@row("A", "continual.py --batch-size 4")
@row("A", "continual.py --max-batches 10")
def check_continual(home: Home) -> None:
    mid(home)
    home.run(CONTINUAL + " --output eval/continual.json")
    assert read_result(home.folder / "eval/continual.json").metrics


# A: documents


def leads_to(*pages: str) -> Check:
    """A check that our pages are there."""

    def check(home: Home) -> None:
        for page in pages:
            assert (ROOT / page).is_file(), page

    return check


PAGES = {
    "docs/guide.md": "README.md docs/training.md docs/data.md docs/evaluation.md",
    "docs/release_plan.md": "CHANGELOG.md",
    "docs/data_pipeline.md": "docs/data.md",
    "docs/scaling_guidance.md": "docs/training.md docs/performance.md",
    "docs/stage1_plan.md": "docs/architecture.md",
    "docs/stage2_plan.md": "docs/architecture.md",
    "docs/stage2_progress.md": "docs/training.md",
    "docs/experiments_report.md": "docs/results.md",
    "docs/stability_journal.md": "docs/results.md docs/errata.md",
    "docs/future_directions.md": "CHANGELOG.md",
    "reports/stage2_smoke.md": "scripts/run_e2e_smoke.sh",
    "google_papers/": "docs/paper_map.md",
}
for theirs, ours in PAGES.items():
    row("A", theirs, ", ".join(ours.split()))(leads_to(*ours.split()))
row("A", "CHANGELOG.md")(leads_to("CHANGELOG.md"))
row(
    "A",
    "logs/, artifacts/examples/: sample outputs",
    "docs/results.md",
    "made by `nl reproduce`, not kept as files",
)(leads_to("docs/results.md"))


# B: install, tests, demonstration


@row("B", "pip install -r requirements.txt", "", "with the project itself, to be edited")
def check_requirements(home: Home) -> None:
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line[0] != "#"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    pinned = {line for line in lines if not line.startswith(("-e .", "notebook=="))}
    assert pinned <= set(project["tool"]["uv"]["constraint-dependencies"])
    needed = project["project"]["dependencies"] + project["dependency-groups"]["dev"]
    names = {re.split(r"[<>=; ]", line)[0] for line in lines}
    assert {re.split(r"[<>=; ]", name)[0] for name in needed} <= names
    assert all(re.fullmatch(r"[\w-]+==[\w.]+( ; .+)?", line) for line in lines if line != "-e .")


@row("B", "./test.sh", tier="thorough")
@row("B", "pytest tests/ -v", tier="thorough")
def check_test_script(home: Home) -> None:
    printed = shell("./test.sh --collect-only -v tests/test_lock.py", PATH=path())
    assert "test_lock.py" in printed and " 1 error" not in printed


@row(
    "B",
    "jupyter notebook notebooks/01_cms_demo.ipynb",
    "",
    "`uv run pytest -m thorough notebooks` runs it whole",
)
def check_notebook(home: Home) -> None:
    assert json.loads((ROOT / "notebooks/01_cms_demo.ipynb").read_text())["nbformat"] == 4


@row("B", "python examples/simple_example.py")
def check_example(home: Home) -> None:
    words = " --input-size 8 --hidden-size 16 --steps 32"
    assert "level2_medium: 2 updates" in home.run("python examples/simple_example.py" + words)


# B: Python

NAMES = """
import torch
import torch.nn as nn
from src.model import NestedModel
from src.scheduler import ChunkedUpdateScheduler
from src.utils import load_config, set_seed, setup_optimizers
"""
MINIMAL = """
set_seed(42)
model = NestedModel(input_size=768, hidden_size=3072)
chunk_sizes = {"level1_fast": 1, "level2_medium": 16, "level3_slow": 256}
scheduler = ChunkedUpdateScheduler(chunk_sizes)
optimizers = setup_optimizers(model=model, chunk_sizes=chunk_sizes, base_lr=1e-4)
dataloader = [(torch.randn(2, 3, 768), torch.randn(2, 3, 768)) for _ in range(16)]
criterion = nn.MSELoss()
global_step = 0

for data, targets in dataloader:
    global_step += 1
    output = model(data)
    loss = criterion(output, targets)
    loss.backward()
    for level_name, module in model.levels.items():
        if scheduler.should_update(level_name, global_step):
            optimizers[level_name].step()
            scheduler.mark_updated(level_name, global_step)
            for p in module.parameters():
                if p.grad is not None:
                    p.grad.zero_()
"""
CONFIG = """
config = load_config("configs/default_config.yaml")
model = NestedModel(**config.model)
optimizers = setup_optimizers(model=model, chunk_sizes=config.scheduler.chunk_sizes, **config["optimizer"])
"""


def execute(code: str) -> dict[str, Any]:
    """The names that a program leaves behind; it is run in the root of the repository, as B asks for."""
    names: dict[str, Any] = {}
    with chdir(ROOT), pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT))
        exec(NAMES + code, names)
    return names


@row(
    "B",
    "from src.model import NestedModel",
    "from nested_learning import NestedModel",
    "`src` works in the root of a clone",
)
@row("B", "NestedModel(input_size=768, hidden_size=3072)")
@row(
    "B",
    "from src.scheduler import ChunkedUpdateScheduler",
    "from nested_learning import ChunkedUpdateScheduler",
)
@row(
    "B",
    "from src.utils import setup_optimizers, set_seed",
    "from nested_learning import setup_optimizers, set_seed",
)
@row(
    "B",
    "setup_optimizers(model=…, chunk_sizes=…, base_lr=1e-4)",
    "setup_optimizers(model=…, periods=…, base_lr=1e-4)",
    "the old keyword works too",
)
@row("B", "model.levels.items()")
@row("B", "scheduler.should_update(level_name, global_step)")
@row("B", "scheduler.mark_updated(level_name, global_step)")
def check_minimal(home: Home) -> None:
    names = execute(MINIMAL)
    assert names["scheduler"].updates == {"level1_fast": 16, "level2_medium": 1, "level3_slow": 0}
    rates = [optimizer.param_groups[0]["lr"] for optimizer in names["optimizers"].values()]
    assert rates == pytest.approx([1e-4, 1e-4 / 16, 1e-4 / 256])


@row(
    "B",
    "from src.utils import load_config",
    "",
    "sections as a mapping; runs have `nested_learning.load_config`",
)
@row("B", "load_config('configs/default_config.yaml')")
@row("B", "model.input_size, model.hidden_size")
@row("B", "scheduler.chunk_sizes.level1_fast, .level2_medium, .level3_slow")
@row("B", "optimizer.base_lr, optimizer.optimizer_type")
def check_config(home: Home) -> None:
    names = execute(CONFIG)
    assert names["config"]["scheduler"]["chunk_sizes"]["level3_slow"] == 256
    assert isinstance(names["optimizers"]["level1_fast"], torch.optim.Adam)
    assert names["model"].input_size == 768


row("B", "src/model.py", "src/nested_learning/models/nested_mlp.py")(leads_to("src/model.py"))
row("B", "src/scheduler.py", "src/nested_learning/levels.py")(leads_to("src/scheduler.py"))
row("B", "src/ in the Python path", "", "or install the project")(leads_to("src/utils.py"))
row("B", "reference/NL.pdf", "docs/paper_map.md", "the paper is not shipped")(leads_to("docs/paper_map.md"))
row("B", "Tier 2: auxiliary losses", "nested_learning.models.nested_mlp.AuxiliaryHeads")(
    leads_to("src/nested_learning/models/nested_mlp.py")
)
row("B", "Tier 3: learned learning rates", "setup_optimizers(…, learn_rates=…)")(
    leads_to("src/nested_learning/optim/learned_rates.py")
)


# The tests


@pytest.mark.parametrize(
    "asked",
    [
        pytest.param(
            r, id=f"{r.document}: {r.theirs[:60]}", marks=getattr(pytest.mark, r.tier) if r.tier else []
        )
        for r in ROWS
        if r.check is not None
    ],
)
def test_what_was_asked_for_works(asked: Row, home: Home) -> None:
    assert asked.check is not None
    if asked.check not in home.passed:
        asked.check(home)
        home.passed.add(asked.check)


def test_a_row_is_checked_or_has_a_reason() -> None:
    assert all((r.check is None) == bool(r.struck) for r in ROWS)
    assert len({(r.document, r.theirs) for r in ROWS}) == len(ROWS)


@pytest.mark.parametrize(("name", "least"), [("pilot", 2.5), pytest.param("mid", 12, marks=pytest.mark.slow)])
def test_a_run_without_data_fits_the_machine_or_says_so(
    name: str, least: float, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    config, line = with_sample(load_config(name, ["train.seq_len=256"]))
    assert config.data.files == ("bundled",) and "text that comes with the package" in line
    monkeypatch.setattr("nested_learning.train.trial.host_bytes", lambda: 24 * 2**30)
    fitted, line = fit_trial(config, OneProcess())
    assert fitted.train.accumulation == fitted.train.batch_size == 1
    assert f"reads 1 of {config.train.batch_size} rows" in line
    assert fitted.model == config.model and fitted.optim == config.optim and "on one H100" in line
    assert "20 each" in describe_trial(fitted, 1000)
    monkeypatch.setattr("nested_learning.train.trial.host_bytes", lambda: least * 2**30)
    with pytest.raises(ValueError, match=f"{name} needs .* GiB even with one row at a time"):
        fit_trial(config, OneProcess())


def test_what_stands_beside_a_translated_name_has_the_last_word() -> None:
    given = ["--config-name", "pilot", "logging.wandb=offline", "logging.enabled=true", "name=a"]
    ours = ["--config-name", "pilot", "logging.wandb=online", "logging.wandb=offline", "name=a"]
    assert our_arguments(given) == ours
    assert our_arguments(ours) == ours
    assert our_arguments(["-m", "logging.backend=json"]) == ["-m", "logging.wandb=none"]


def test_a_path_that_is_there_is_taken_as_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    theirs, ours = Path("checkpoints/mid/step_000100.pt"), Path("outputs/mid/checkpoints/step_00000100")
    assert our_path(theirs) == str(theirs)  # neither is there: errors are to name what was given
    ours.mkdir(parents=True)
    assert our_path(theirs) == str(ours)
    theirs.parent.mkdir(parents=True)
    theirs.touch()
    assert our_path(theirs) == str(theirs)


# The page


def migration() -> str:
    """docs/migration.md."""
    lines = [
        "# Coming from another implementation",
        "",
        "Two documents whose commands people copy, and what each name is here. Names on the left work as",
        "they are written, except for pages and for what is listed as not run by a test; the column in the",
        "middle says what they lead to where that has another name. `tests/test_asked.py` runs every row,",
        "and this page is made from it by `uv run python tests/test_asked.py`.",
    ]
    for document, title in (
        ("A", "An earlier reproduction"),
        ("B", "A Continuum Memory System to start with"),
    ):
        own = [r for r in ROWS if r.document == document]
        lines += ["", f"## {title}", "", "| theirs | ours | |", "|---|---|---|"]
        lines += [f"| {_code(r.theirs)} | {_code(r.ours)} | {r.note} |" for r in own if not r.struck]
        if any(r.struck for r in own):
            lines += ["", "Not run by a test:", "", "| theirs | ours | why |", "|---|---|---|"]
            lines += [f"| {_code(r.theirs)} | {_code(r.ours)} | {r.struck} |" for r in own if r.struck]
    return "\n".join(lines) + "\n"


def _code(name: str) -> str:
    return f"`{name}`" if name else "the same"


def test_the_page_is_made_of_the_rows() -> None:
    assert PAGE.read_text(encoding="utf-8") == migration(), "run `uv run python tests/test_asked.py`"


if __name__ == "__main__":
    PAGE.write_text(migration(), encoding="utf-8")
