"""A person's mistakes at every entry point: one line on stderr, exit status 2, and nothing left behind."""

import json
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra

from nested_learning.command import is_mistake, run_command
from nested_learning.commands import nl
from nested_learning.train.checkpoint import export_checkpoint
from nested_learning.train.config import run_config
from nested_learning.train.launch import launch

ROOT = Path(__file__).parents[1]
TINY = (
    "data=bytes levels=mlp model.dim=16 model.num_heads=2 model.num_layers=1 model.chunk_size=8 "
    "train.seq_len=16 train.batch_size=2 train.steps=1 train.device=cpu train.sample_tokens=0 "
    "logging.progress=false data.files=[{given}/text.txt] data.cache_dir={given}/cache"
)
BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9)
)
FILES = {
    "text.txt": "It is a truth universally acknowledged. " * 80,
    "empty.txt": "",
    "bombs/bomb.yaml": BOMB,
    "broken.yaml": "a: [1",
    "no_mixture.yaml": "valid_fraction: 0.1\n",
    "unknown_key.yaml": "mixture: {sources: [{name: a, kind: text, pathh: a.txt}]}\n",
    "mixture.yaml": "shards: shards\nmixture: {sources: [{name: a, kind: text, path: {given}/nope.txt}]}\n",
    "segments.yaml": "segments: [{name: a, files: [{given}/nope.txt]}]\n",
    "tasks/piqa.jsonl": '{"goal": "a", "sol1": "b"\n',
    "wrong.json": "[1, 2]",
    "wrong.csv": "words,kind_of_thing\na,b\n",
}

WRONG = {
    # what: (entry point, its arguments, part of the line)
    "a configuration that is not there": ("train.py", "--config-name pilott", "did you mean pilot?"),
    "an unknown key": ("train.py", "optim.lrr=1", "unknown key 'optim.lrr'; did you mean optim.lr?"),
    "a key of no section": ("train.py", "+optimm.lr=1", "did you mean optim"),
    "a text for a number": ("train.py", "optim.lr=fast", "optim.lr must be a finite number, got 'fast'"),
    "no number": ("train.py", "optim.lr=nan", "optim.lr must be a finite number, got nan"),
    "half a list": ("train.py", "data.files=[", "data.files=["),
    "an unknown choice": ("train.py", "optim=adamww", "did you mean adamw?"),
    "an unknown experiment": ("train.py", "+experiment=mixer_atention", "did you mean mixer_attention?"),
    "an unknown option": ("train.py", "--config-nme pilot", "did you mean --config-name?"),
    "two options that exclude each other": ("train.py", "--resolve", "--cfg"),
    "a folder of configurations that is not there": ("train.py", "--config-dir nope", "--config-dir must be"),
    "YAML that explodes": (
        "train.py",
        "--config-dir {given}/bombs --config-name bomb",
        "bomb.yaml holds",
    ),
    "a text that is not there": ("train.py", "data.files=[nope.txt]", "nope.txt"),
    "an empty text": ("train.py", "data.files=[{given}/empty.txt]", "empty.txt"),
    "a text of bytes": ("train.py", "data.files=[{given}/latin.txt]", "latin.txt"),
    "shards that are not there": ("train.py", "data.shards=nope", "nope"),
    "a tokenizer that is not there": ("train.py", "data.tokenizer.path=nope.model", "nope.model"),
    "a tokenizer that is none": ("train.py", "data.tokenizer.path={given}/text.txt", "text.txt"),
    "a checkpoint to go on from that is not there": (
        "train.py",
        "train.resume=nope",
        "no checkpoint at nope",
    ),
    "a damaged checkpoint": ("train.py", "train.resume={given}/damaged", "damaged"),
    "the checkpoint of another model": ("train.py", "train.resume={run}", "model"),
    "a device that is not there": ("train.py", "train.device=cuda:7", "train.device = 'cuda:7' is not on"),
    "a name that leaves the folder": ("train.py", "name=../x", "name must be a folder name"),
    "a file for a folder": ("train.py", "train.output_dir={given}/text.txt", "text.txt"),
    "another vocabulary": (
        "train.py",
        "model.vocab_size=99",
        "model.vocab_size is 99 but the tokenizer has 257",
    ),
    "a batch that does not divide": ("train.py", "train.accumulation=3", "train.accumulation must divide"),
    "a job of a sweep that cannot be": (
        "train.py",
        "-m experiment=mixer_titans,mixer_titan",
        "mean mixer_titans?",
    ),
    "a sweep over an unknown key": ("train.py", "-m optim.lrr=1,2", "did you mean optim.lr?"),
    "a key of DDP": ("train_dist.py", "parallel.gather_dtyp=bf16", "did you mean parallel.gather_dtype?"),
    "a key of FSDP": ("train_fsdp.py", "parallel.gather_dtype=fp8", "must be one of fp32, bf16, got 'fp8'"),
    "a file of DeepSpeed": ("train_deepspeed.py", "parallel.deepspeed=no.json", "eepspeed"),
    "an unknown subcommand": ("nl", "plann", "did you mean plan?"),
    "an unknown option of nl": ("nl", "plan --gpu_s 3", "did you mean --gpus?"),
    "no GPUs": ("nl", "plan --gpus 0", "--gpus must be whole numbers of at least 1, got '0'"),
    "GPUs that do not divide the batch": ("nl", "plan --config-name pilot_smoke --gpus 3", "got 3"),
    "more than the peak": ("nl", "plan --mfu 2", "--mfu must be in (0, 1], got 2.0"),
    "a plan of nothing": ("nl", "plan --config-name pilott", "did you mean pilot?"),
    "a plan with an unknown key": ("nl", "plan optim.lrr=1", "did you mean optim.lr?"),
    "an audit of nothing": ("nl", "audit --config-name nope", "no configuration 'nope'"),
    "an audit of it is not said what": ("nl", "audit", "--config-name"),
    "verifying nothing": ("nl", "verify-checkpoint nope", "no checkpoint at nope"),
    "verifying an exported file": ("nl", "verify-checkpoint {exported}", "only checkpoint folders"),
    "exporting nothing": ("nl", "export nope", "no checkpoint at nope"),
    "exporting into the checkpoint": ("nl", "export {run} --output {step}/model.safetensors", "checkpoint"),
    "exporting to another kind of file": ("nl", "export {run} --output x.bin", ".safetensors"),
    "an unknown experiment of nl": ("nl", "reproduce recal", "did you mean recall?"),
    "no steps": ("nl", "reproduce recall --steps 0", "must be at least 1, got 0"),
    "an unknown option of an experiment": ("nl", "reproduce recall --stepz 3", "did you mean --steps?"),
    "no checkpoint": ("eval/zeroshot.py", "--tasks piqa", "--checkpoint is missing"),
    "a checkpoint that is not there": ("eval/passkey.py", "--checkpoint nope", "no checkpoint at nope"),
    "a checkpoint that is none": ("eval/niah.py", "--checkpoint {given}/text.txt", "text.txt"),
    "an unknown task": (
        "eval/zeroshot.py",
        "--checkpoint {exported} --local-dir {given}/tasks --tasks piqua",
        "did you mean piqa?",
    ),
    "a folder of tasks that is not there": (
        "eval/zeroshot.py",
        "--checkpoint {exported} --local-dir nope --tasks piqa",
        "nope",
    ),
    "a broken file of a task": (
        "eval/zeroshot.py",
        "--checkpoint {exported} --local-dir {given}/tasks --tasks piqa",
        "piqa.jsonl",
    ),
    "fewer than no questions": (
        "eval/zeroshot.py",
        "--checkpoint {exported} --local-dir {given}/tasks --max-samples -1",
        "max_samples",
    ),
    "no number of questions": (
        "eval/zeroshot.py",
        "--max-samples few",
        "--max-samples: invalid int value: 'few'",
    ),
    "an unknown option of a script": ("eval/zeroshot.py", "--taskz piqa", "did you mean --tasks?"),
    "a device that is none": ("eval/passkey.py", "--checkpoint {exported} --device gpu", "--device must be"),
    "no pretrained model": (
        "eval/second_reading.py",
        "--model nowhere --layers 1",
        "has no config.json",
    ),
    "layers that are none": ("eval/second_reading.py", "--model x --layers 1,a", "--layers"),
    "no depth": ("eval/passkey.py", "--checkpoint {exported} --depths 0", "depths"),
    "fewer than no samples": ("eval/passkey.py", "--checkpoint {exported} --samples-per-length -1", "got -1"),
    "no window": (
        "eval/held_out.py",
        "--checkpoint {exported} --length 0",
        "length must be at least 1, got 0",
    ),
    "an unknown needle": ("eval/niah.py", "--checkpoint {exported} --tasks s9", "s9"),
    "a length without room": ("eval/niah.py", "--checkpoint {exported} --context-lengths 8", "8"),
    "a haystack that is not there": (
        "eval/niah.py",
        "--checkpoint {exported} --haystack nope.txt",
        "nope.txt",
    ),
    "segments that are not there": (
        "eval/continual.py",
        "--checkpoints {exported} --segments-yaml nope.yaml",
        "nope.yaml",
    ),
    "a segment whose file is not there": (
        "eval/continual.py",
        "--checkpoints {exported} --segments-yaml {given}/segments.yaml",
        "nope.txt",
    ),
    "texts that are not there": ("eval/long_perplexity.py", "--checkpoint {exported} --files nope", "nope"),
    "texts shorter than a span": (
        "eval/long_perplexity.py",
        "--checkpoint {exported} --files {given}/text.txt --length 1000000",
        "1000000",
    ),
    "spans of no token": ("eval/long_perplexity.py", "--checkpoint {exported} --length 0", "length"),
    "a comparison of nothing": ("eval/compare.py", "nope", "nope"),
    "the forgetting of nothing": ("eval/forgetting.py", "nope.json --output x.png", "nope.json"),
    "examples that are not there": (
        "eval/class_incremental.py",
        "--checkpoint {run} --train nope.json",
        "nope.json",
    ),
    "examples without labels": (
        "eval/class_incremental.py",
        "--checkpoint {run} --train {given}/wrong.csv",
        "wrong.csv",
    ),
    "an unknown method": (
        "eval/class_incremental.py",
        "--checkpoint {run} --train {given}/wrong.csv --methods ewcc",
        "ewcc",
    ),
    "a result that is not there": ("eval/summarise.py", "nope.json", "nope.json"),
    "a result that is none": ("eval/summarise.py", "{given}/wrong.json", "wrong.json"),
    "a mixture that is not there": (
        "data/process_mixture.py",
        "nope.yaml",
        "no configuration file nope.yaml",
    ),
    "a mixture that is no YAML": ("data/process_mixture.py", "{given}/broken.yaml", "broken.yaml"),
    "a mixture with an unknown key": ("data/process_mixture.py", "{given}/unknown_key.yaml", "did you mean"),
    "a source that is not there": (
        "data/process_mixture.py",
        "{given}/mixture.yaml --workers 0 --no-progress tokenizer.kind=byte tokenizer.vocab_size=257",
        "nope.txt",
    ),
    "no mixture": ("data/validate_mixture.py", "{given}/no_mixture.yaml", "no `mixture`"),
    "no tokenizer": ("data/check_tokenizer.py", "--tokenizer-path nope.model", "nope.model"),
    "a text for a tokenizer": ("data/check_tokenizer.py", "--tokenizer-path {given}/text.txt", "text.txt"),
    "a vocabulary that is no number": (
        "data/train_tokenizer.py",
        "--manifest {given}/mixture.yaml --vocab-size big --output-dir out",
        "--vocab-size: invalid int value: 'big'",
    ),
    "a mixture that is not there, with a log": (
        "data/train_tokenizer.py",
        "--manifest nope.yaml --vocab-size 400 --output-dir out --log-file logs/log.txt",
        "no configuration file nope.yaml",
    ),
    "an unknown type of tokenizer": (
        "data/train_tokenizer.py",
        "--manifest {given}/mixture.yaml --vocab-size 400 --output-dir out --model-type unigran",
        "did you mean unigram?",
    ),
    "a picture without room": ("data/draw_rows.py", "--output rows.png --seq-len 0", "seq"),
    "less than no text": ("data/local_corpus.py", "--output-dir out --megabytes -1", "--megabytes"),
    "an unknown source": (
        "data/measure.py",
        "--manifest {given}/mixture.yaml --source b --tokenizer-path x --output-dir out",
        "--source must be one of a, got 'b'",
    ),
    "an unknown mixer": ("bench/speed.py", "--mixers titan --output out", "did you mean titans?"),
    "a length that is no number": ("bench/speed.py", "--lengths long --output out", "--lengths"),
    "a chunk of nothing": ("bench/cms.py", "--chunks 0", "chunk_size"),
    "an optimizer from nowhere": ("bench/optimizers.py", "--output out --other nope.py:X", "nope.py"),
    "a model of no mixer": (
        "bench/optimizers.py",
        "--output out --mixer atention",
        "did you mean attention?",
    ),
    "a benchmark of nothing": ("bench/distributed.py", "--config-name pilott", "did you mean pilot?"),
}


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """Everything that the arguments above name: files, a trained run, the same exported, a damaged one."""
    folder = tmp_path_factory.mktemp("given")
    for name, text in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text.replace("{given}", str(folder)))
    (folder / "latin.txt").write_bytes("déjà vu ".encode("latin-1") * 99)
    tiny = {"dim": 16, "num_layers": 1, "num_heads": 2, "chunk_size": 4, "vocab_size": 257, "seq_len": 16}
    config = run_config(
        {
            "name": "run",
            "model": {**tiny, "levels": [{"name": "fast", "chunk_size": 8}]},
            "data": {
                "files": [str(folder / "text.txt")],
                "cache_dir": str(folder / "cache"),
                "tokenizer": {"kind": "byte", "vocab_size": 257},
            },
            "train": {
                "steps": 1,
                "batch_size": 2,
                "seq_len": 16,
                "output_dir": str(folder),
                "device": "cpu",
                "sample_tokens": 0,
            },
            "logging": {"progress": False},
        }
    )
    launch(config)
    export_checkpoint(config.run_dir, folder / "model.safetensors")
    step = config.run_dir / "checkpoints" / "step_00000001"
    (folder / "damaged").mkdir()
    for file in step.iterdir():
        (folder / "damaged" / file.name).write_bytes(file.read_bytes()[:-1])
    return {"given": folder, "run": config.run_dir, "exported": folder / "model.safetensors", "step": step}


@pytest.fixture
def enter(given, tmp_path, monkeypatch, capsys):
    """Run an entry point in this process and in an empty folder: exit status, output, errors."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("NL_DEBUG", "HYDRA_FULL_ERROR", "RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)

    def run(entry, arguments):
        if entry.startswith("train"):
            arguments = f"{TINY} {arguments}"
        words = [word.replace("{", "{0[").replace("}", "]}").format(given) for word in arguments.split()]
        file = ROOT / entry if entry.startswith("train") else ROOT / "scripts" / entry
        monkeypatch.setattr(sys, "argv", [str(file), *words])
        GlobalHydra.instance().clear()
        capsys.readouterr()
        if entry == "nl":
            status = nl.main(words)
        else:
            with pytest.raises(SystemExit) as stop:
                runpy.run_path(str(file), run_name="__main__")
            status = stop.value.code
        return status, *capsys.readouterr()

    return run


def files_of(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if "cache" not in path.parts}


@pytest.mark.parametrize("what", WRONG)
def test_it_is_one_line_and_leaves_nothing(enter, given, tmp_path, what):
    entry, arguments, part = WRONG[what]
    before = files_of(given["given"])
    status, _, error = enter(entry, arguments)
    assert error.count("\n") == 1 and error.endswith("\n"), error
    assert part in error and error.startswith(f"{Path(entry).name}: "), error
    assert status == 2
    assert list(tmp_path.iterdir()) == []
    assert files_of(given["given"]) == before


def test_a_mistake_beside_overwrite_deletes_nothing(enter, tmp_path):
    shards = tmp_path / "shards"
    shards.mkdir()
    (shards / "mixture.json").write_text("{}")
    arguments = "{given}/mixture.yaml --overwrite --tokenizer-path nope.model --output-dir shards"
    assert enter("data/process_mixture.py", arguments)[0] == 2
    assert (shards / "mixture.json").exists()


def test_options_may_stand_between_overrides(enter):
    status, _, error = enter("train.py", "seed=1 --config-name mid_smoke optim.lr=nan")
    assert (status, error) == (2, "train.py: optim.lr must be a finite number, got nan\n")


def test_every_entry_point_is_tried_here():
    folders = ("bench", "data", "eval")  # scripts/docs is for those who change the pages
    scripts = [f"{name}/{path.name}" for name in folders for path in ROOT.glob(f"scripts/{name}/*.py")]
    entries = ["nl", *(path.name for path in ROOT.glob("train*.py")), *scripts]
    assert {entry for entry, _, _ in WRONG.values()} == set(entries)


@pytest.mark.parametrize(
    "entry, arguments",
    [
        ("nl", "plan --gpus 0"),
        ("eval/niah.py", "--checkpoint nope"),
        ("train.py", "optim.lrr=1"),
        ("train.py", "name=../x"),
    ],
)
def test_debug_shows_the_traceback_before_the_line(enter, monkeypatch, entry, arguments):
    status, _, line = enter(entry, arguments)
    for debug, variable in (("--debug", "NL_DEBUG"), ("", "NL_DEBUG")):
        if not debug:
            monkeypatch.setenv(variable, "1")
        shown = enter(entry, f"{arguments} {debug}")
        assert shown[0] == status == 2
        assert shown[2].startswith("Traceback (most recent call last):") and shown[2].endswith(f"\n{line}")


def test_a_fault_of_ours_keeps_its_traceback(enter, monkeypatch):
    monkeypatch.setattr("nested_learning.commands.train.launch", lambda *_: {}["nothing"])
    status, _, error = enter("train.py", "seed=1")
    assert status == 1 and error.startswith("Traceback") and error.endswith("KeyError: 'nothing'\n")
    monkeypatch.setattr("nested_learning.commands.doctor.main", lambda: {}["nothing"])
    with pytest.raises(KeyError):
        nl.main(["doctor"])


def raised(action):
    try:
        action()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


@pytest.mark.parametrize(
    "action, mistake",
    [
        (lambda: run_config({"seed": -1}), True),
        (lambda: torch.nn.Conv1d(3, 3, 1, groups=2), False),  # a ValueError of torch
        (lambda: int("x"), True),  # no library below us
        (lambda: Path("no such file").read_text(), True),
        (lambda: torch.ones(2) + torch.ones(3), False),
        (lambda: [][0], False),
        (lambda: __import__("no_such_package"), True),
        (lambda: __import__("nested_learning.no_such_module"), False),
    ],
)
def test_what_counts_as_a_mistake(action, mistake):
    assert is_mistake(raised(action)) == mistake


def test_an_error_of_several_lines_becomes_one(capsys):
    def action():
        raise ValueError("two\n  lines\n")

    assert run_command("nl", action) == 2
    assert capsys.readouterr().err == "nl: two lines\n"


def test_ctrl_c_is_130(capsys):
    assert run_command("nl", lambda: signal.raise_signal(signal.SIGINT)) == 130
    assert "the same command goes on" in capsys.readouterr().err


def test_rank_0_speaks_first_and_torchrun_is_told(monkeypatch, tmp_path, capsys):
    waited = []
    monkeypatch.setattr("nested_learning.command.time.sleep", waited.append)
    for rank in (0, 1):
        report = tmp_path / f"{rank}.json"
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(report))
        assert run_command("x.py", lambda: run_config({"seed": -1})) == 2
        line = capsys.readouterr().err.strip()
        assert line == ("rank 1: " * rank) + "x.py: seed must be in [0, 9223372036854775808), got -1"
        assert json.loads(report.read_text())["message"]["message"] == line
        assert len(waited) == rank  # time for torchrun to end the others once rank 0 has ended


def started(folder, *command):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert list(folder.iterdir()) == []
    return done.returncode, done.stdout, done.stderr


@pytest.mark.thorough
def test_in_a_process_of_its_own(tmp_path):
    line = "nl: --gpus must be whole numbers of at least 1, got '0'\n"
    assert started(tmp_path, "-m", "nested_learning.commands.nl", "plan", "--gpus", "0") == (2, "", line)


RANKS = ("--nproc-per-node", "2", ROOT / "train_dist.py", "optim.lrr=1")


@pytest.mark.thorough
def test_two_ranks_say_it_once(tmp_path):
    status, _, error = started(tmp_path, "-m", "nested_learning.torchrun", *RANKS)
    assert error.startswith("train_dist.py: unknown key 'optim.lrr'; did you mean optim.lr?"), error
    assert (status, error.count("\n")) == (2, 1)


@pytest.mark.slow
def test_torchrun_itself_begins_with_the_line_and_has_it_for_its_root_cause(tmp_path):
    status, _, error = started(tmp_path, "-m", "torch.distributed.run", *RANKS)
    line = "train_dist.py: unknown key 'optim.lrr'; did you mean optim.lr?"
    assert status == 1 and error.startswith(line), error
    assert error.count(line) == 2 and error.rpartition("traceback : ")[2].startswith(line)
