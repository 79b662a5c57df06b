"""The command lines of the data path, run as users do, on small local files."""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from nested_learning.commands.data.common import with_limits
from nested_learning.config import load_config, load_data_config
from nested_learning.data.corpus import load_corpus

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "data"))

from texts import documents  # noqa: E402

MIXTURES = sorted(
    path.stem
    for path in (ROOT / "configs" / "data").glob("*.yaml")
    if not path.stem.startswith("continual_segments") and load_data_config(path).mixture is not None
)


@pytest.fixture
def config(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in documents(150)))
    (tmp_path / "b.txt").write_text("\n\f\n".join(documents(80, first=300, num_words=200)))
    path = tmp_path / "mine.yaml"
    path.write_text(f"""
shards: {tmp_path / "shards"}
tokenizer: {{vocab_size: 400}}
mixture:
  valid_share: 0.2
  sources:
    - {{name: a, kind: jsonl, path: {tmp_path / "a.jsonl"}, filter: {{min_chars: 50, language: en}}}}
    - {{name: b, kind: text, path: {tmp_path / "b.txt"}, weight: 2}}
""")
    return path


@pytest.fixture
def script(monkeypatch, capsys):
    """Run a script of `scripts/data/` in this process: exit code, output, errors."""

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(ROOT / "scripts" / "data" / name), run_name="__main__")
        out, err = capsys.readouterr()
        return stop.value.code, out, err

    return run


def test_from_text_to_shards_and_training_tokens(script, config, tmp_path):
    output, log = tmp_path / "tokenizer", tmp_path / "log.txt"
    model = output / "tokenizer.model"
    arguments = ("--manifest", config, "--vocab-size", 400, "--output-dir", output, "--log-file", log)
    code, out, _ = script("train_tokenizer.py", *arguments, "--no-progress")
    assert code == 0 and re.search(r"(?m)^\| a +\|", out) and "400 pieces, unigram" in out
    report = json.loads((output / "report.json").read_text())
    assert report["vocab_size"] == 400 and report["sources"]["a"]["unknown"] == 0
    assert report["held_out"] == {"a": True, "b": True} and report["normalisation"].startswith("none")
    code, out, _ = script("process_mixture.py", config, "--tokenizer-path", model, "--log-file", log,
                          "--workers", 0, "--no-progress")  # fmt: skip
    assert code == 0 and "data.tokenizer.vocab_size=400" in out
    assert re.search(r"(?m)^\S+ a: 150 records, 150 kept", log.read_text())
    code, out, _ = script("validate_mixture.py", config, "--shards", tmp_path / "shards", "--seq-len", 64)
    assert re.search(r"shards/b: \d+.\d% padding", out)
    assert code == 0 and out.endswith("all good\n") and "a: weight 0.3333, jsonl: 1 file;" in out
    code, out, _ = script("check_tokenizer.py", "--tokenizer-path", model, "--manifest", config,
                          "--shards", tmp_path / "shards")  # fmt: skip
    assert code == 0 and out.endswith("all good\n")
    corpus = load_corpus(load_data_config(config))
    assert corpus.tokenizer.vocab_size == 400 and corpus.train.weights == [1.0, 2.0]
    # damage is found
    victim = tmp_path / "shards" / "a" / "train-00000.bin"
    victim.write_bytes(b"\0" + victim.read_bytes()[1:])
    code, out, _ = script("validate_mixture.py", config, "--shards", tmp_path / "shards")
    assert code == 1 and "train-00000.bin has another SHA-256" in out
    # and other settings are refused, unless one starts anew
    again = ("process_mixture.py", config, "mixture.seed=5", "--tokenizer-path", model, "--workers", 0)
    code, _, err = script(*again)
    assert code == 2 and err.startswith("process_mixture.py: ") and "seed is 5, was 0" in err
    assert script(*again, "--overwrite")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("train_tokenizer.py", "--vocab-size", 90_000),
            "vocab_size=90000 is more than this text supports",
        ),
        (("train_tokenizer.py", "--vocab-size", 100), "vocab_size=100 is too small for this text: at least"),
        (
            ("train_tokenizer.py", "--vocab-size", 400, "--limit", "x=3"),
            "--limit x: no such source; there are a, b",
        ),
        (
            ("train_tokenizer.py", "--vocab-size", 400, "--limit", "a"),
            "--limit must be NAME=RECORDS, got 'a'",
        ),
    ],
)
def test_bad_requests_are_one_line(script, config, tmp_path, arguments, message):
    code, _, err = script(*arguments, "--manifest", config, "--output-dir", tmp_path / "out", "--no-progress")
    assert code == 2 and message in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_what_is_missing_is_named(script, config, tmp_path):
    assert "no tokenizer: give --tokenizer-path" in script("process_mixture.py", config)[2]
    assert "there is no configuration file nowhere.yaml" in script("process_mixture.py", "nowhere.yaml")[2]
    assert "has no `mixture`" in script("validate_mixture.py", ROOT / "configs/data/bytes.yaml")[2]
    (tmp_path / "b.txt").unlink()
    code, out, _ = script("validate_mixture.py", config)
    assert code == 1 and "source b: no text file at" in out
    config.write_text(config.read_text().replace("weight: 2", "wieght: 2"))
    assert "wieght" in script("validate_mixture.py", config)[2]


def test_a_tokenizer_that_is_not_that_of_the_shards(script, config, tmp_path):
    for name, size in (("one", 400), ("two", 410)):
        script(
            "train_tokenizer.py", "--manifest", config, "--vocab-size", size, "--output-dir", tmp_path / name
        )
    script("process_mixture.py", config, "--tokenizer-path", tmp_path / "one/tokenizer.model", "--workers", 0)
    code, out, _ = script("check_tokenizer.py", "--tokenizer-path", tmp_path / "two/tokenizer.model",
                          "--shards", tmp_path / "shards")  # fmt: skip
    assert code == 1 and "was made with another tokenizer" in out


def test_local_corpus_has_three_formats(script, tmp_path):
    code, out, _ = script("local_corpus.py", "--output-dir", tmp_path / "local", "--megabytes", 0.3)
    assert code == 0
    files = {path.name for path in (tmp_path / "local").iterdir()}
    assert files == {"prose.jsonl.gz", "docstrings.jsonl.zst", "code.parquet"}
    local = load_data_config(ROOT / "configs/data/local.yaml").mixture
    assert {Path(source.path).name for source in local.sources} == files
    from nested_learning.data.pipeline.sources import Document, read_source

    for source in local.sources:
        source.path = str(tmp_path / "local" / Path(source.path).name)
        items = list(read_source(source))
        assert sum(len(item.text) for item in items) > 90_000
        assert all(isinstance(item, Document) for item in items)


@pytest.mark.parametrize("name", MIXTURES)
def test_every_mixture_is_a_manifest_and_a_choice_of_a_run(name):
    manifest = load_data_config(ROOT / "configs" / "data" / f"{name}.yaml")
    assert load_config("pilot_smoke", [f"data={name}"]).data == manifest
    limited = with_limits(manifest.mixture, [f"{manifest.mixture.sources[0].name}=5"], "validation")
    assert limited.sources[0].limit == 5
    hub = [source for source in limited.sources if source.kind == "hub"]
    assert all(source.fallback_split == "validation" for source in hub)


def test_the_named_sources_have_limits_in_run_full():
    text = (ROOT / "scripts/data/run_full.sh").read_text()
    named = re.findall(r'"(\w+)=\$\{\w+_LIMIT', text)
    mixture = load_data_config(ROOT / "configs/data/refinedweb_mixture_filtered.yaml").mixture
    assert named == [source.name for source in mixture.sources]


@pytest.mark.parametrize("path", sorted((ROOT / "scripts").rglob("run_*.sh")), ids=lambda path: path.name)
def test_shell_scripts_parse(path):
    subprocess.run(["bash", "-n", str(path)], check=True)
    assert os.access(path, os.X_OK)


def test_run_smoke_names_its_sizes():
    result = subprocess.run(
        ["bash", str(ROOT / "scripts/run_smoke.sh"), "huge"], capture_output=True, text=True
    )
    assert result.returncode == 2 and "must be pilot or mid, got 'huge'" in result.stderr
