"""New runs that begin with the weights, model and tokenizer of a checkpoint."""

import re
import runpy
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from hydra.core.global_hydra import GlobalHydra
from test_launch import WORDS, losses, overrides

from nested_learning.config import load_config
from nested_learning.data.config import DedupConfig, MixtureConfig, SourceConfig
from nested_learning.data.corpus import prepare_corpus
from nested_learning.data.loader import sequential_batches
from nested_learning.data.pipeline.process import ProcessingJob, process_mixture
from nested_learning.data.tokenizer import ByteTokenizer
from nested_learning.models.lm import HopeLM
from nested_learning.train.checkpoint import (
    CheckpointError,
    CheckpointStore,
    export_checkpoint,
    find_checkpoint,
    load_checkpoint,
    read_checkpoint,
)
from nested_learning.train.launch import launch
from nested_learning.train.objective import next_token_loss
from nested_learning.train.origin import find_origin

ROOT = Path(__file__).parents[2]
LEVELS = {"levels": "fast", "model.levels.0.chunk_size": 8}


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    """Run directory of a model with a tokenizer of its own."""
    folder = tmp_path_factory.mktemp("old")
    (folder / "rich.txt").write_text("".join(f"{i} boats and {i * 7} sails\n" for i in range(900)))
    settings = {
        **LEVELS,
        "data.files": f"[{folder / 'rich.txt'}]",
        "data.tokenizer.kind": "bpe",
        "data.tokenizer.vocab_size": 300,
        "train.steps": 3,
        "name": "old",
    }
    torch.set_num_threads(1)
    return launch(load_config("pilot_smoke", overrides(folder, **settings))).run_dir


def new(tmp_path, origin, **more):
    """A run of a byte model on other text, told to begin with `origin`."""
    return load_config(
        "pilot_smoke", overrides(tmp_path, **{"train.init_from": origin, "name": "new", **more})
    )


def test_a_new_run_has_model_tokenizer_and_weights_of_the_checkpoint(old, tmp_path, capsys):
    config = new(tmp_path, old, **{"train.steps": 1, "optim.lr": 1e-20, "train.seq_len": 12})
    run_dir = launch(config).run_dir
    said = capsys.readouterr().out
    assert f"starting with the weights, model and tokenizer of {find_checkpoint(old)}" in said
    before, after = read_checkpoint(old), read_checkpoint(run_dir)
    assert before["model"].keys() == after["model"].keys()
    assert all(torch.equal(before["model"][name], after["model"][name]) for name in before["model"])
    assert after["tokenizer"] == before["tokenizer"]
    assert after["step"] == 1 and after["text"] != before["text"]
    recorded = yaml.safe_load((run_dir / "config.yaml").read_text())
    assert recorded["train"]["init_from"] == str(old)
    assert recorded["model"] == {**yaml.safe_load((old / "config.yaml").read_text())["model"], "seq_len": 12}
    assert recorded["data"]["tokenizer"]["vocab_size"] == 300
    assert recorded["data"]["files"] == [str(tmp_path / "text.txt")]


def test_the_first_loss_is_that_of_the_old_weights(old, tmp_path):
    config = new(tmp_path, old, **{"train.steps": 1, "train.eval_every": 1, "optim.lr": 1e-20})
    result = launch(config)
    model, tokenizer, _ = load_checkpoint(old)
    corpus = prepare_corpus([tmp_path / "text.txt"], tokenizer, tmp_path / "cache")
    batches = list(sequential_batches(corpus.valid, 16, 2, 2))
    with torch.no_grad():
        total = sum(float(next_token_loss(model(b[:, :-1])[0], b[:, 1:], b[:, 1:].numel())) for b in batches)
    assert result.valid_loss == pytest.approx(total / len(batches), rel=1e-5)


def test_an_exported_file_and_a_checkpoint_folder_begin_the_same_run(old, tmp_path):
    file = export_checkpoint(old, tmp_path / "old.safetensors")
    first = launch(new(tmp_path, find_checkpoint(old), **{"train.steps": 2, "name": "a"}))
    second = launch(new(tmp_path, file, **{"train.steps": 2, "name": "b"}))
    assert losses(first.run_dir) == losses(second.run_dir)
    assert losses(first.run_dir) != losses(
        launch(load_config("pilot_smoke", overrides(tmp_path, name="c"))).run_dir
    )


def test_it_goes_on_from_its_own_checkpoints_bit_for_bit_without_the_old_one(old, tmp_path):
    origin = shutil.copytree(old, tmp_path / "moved")
    whole = launch(new(tmp_path, origin, name="whole"))
    part = new(tmp_path, origin, name="part", **{"train.save_every": 5})
    launch(part)
    store = CheckpointStore(part.run_dir / "checkpoints", 2)
    shutil.rmtree(store.latest())  # as if it had been killed after step 10
    shutil.rmtree(origin)
    again = launch(part)
    assert again.step == 12
    assert losses(again.run_dir) == losses(whole.run_dir)
    a, b = read_checkpoint(whole.run_dir)["model"], read_checkpoint(again.run_dir)["model"]
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_another_origin_is_refused_where_the_run_has_begun(old, tmp_path):
    launch(new(tmp_path, old, **{"train.steps": 1}))
    other = shutil.copytree(old, tmp_path / "other")
    with pytest.raises(CheckpointError, match=rf"train.init_from is '{other}', was '{old}'"):
        launch(new(tmp_path, other, **{"train.steps": 1}))


def test_a_run_does_not_begin_with_itself(old, tmp_path):
    run_dir = launch(
        load_config("pilot_smoke", overrides(tmp_path, name="new", **{"train.steps": 1}))
    ).run_dir
    for more in ({}, {"train.resume": "null"}):
        with pytest.raises(ValueError, match="belongs to this run itself.*a name= of its own"):
            launch(new(tmp_path, run_dir, **more))
    assert find_checkpoint(run_dir)


def test_a_checkpoint_that_is_not_there_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(CheckpointError, match="there is no checkpoint at nowhere"):
        launch(new(tmp_path, "nowhere"))
    assert not (tmp_path / "out").exists()


def test_a_length_that_makes_a_slow_level_fast_is_refused(tmp_path):
    settings = {"model.levels": "[{name: calm, chunk_size: 32}]", "train.steps": 1, "name": "slow"}
    slow = launch(load_config("pilot_smoke", overrides(tmp_path, **settings))).run_dir
    with pytest.raises(ValueError, match="train.seq_len = 64 would make level calm fast, which is slow in"):
        launch(new(tmp_path, slow, **{"train.seq_len": 64}))
    assert not (tmp_path / "out" / "new").exists()
    assert launch(new(tmp_path, slow, **{"train.seq_len": 8, "train.steps": 1})).step == 1


def test_shards_of_another_tokenizer_are_refused(old, tmp_path):
    (tmp_path / "texts.jsonl").write_text("\n".join(f'{{"text": "{WORDS * 3}{i}"}}' for i in range(40)))
    source = SourceConfig(name="texts", kind="jsonl", path=str(tmp_path / "texts.jsonl"))
    mixture = MixtureConfig(sources=(source,), dedup=DedupConfig(near=False), valid_share=0.2)
    shards = tmp_path / "shards"
    process_mixture(
        ProcessingJob(
            mixture=mixture, tokenizer=ByteTokenizer(), folder=shards, progress=False, log=lambda _: None
        )
    )
    with pytest.raises(ValueError, match=r"data.shards = .* were made with another tokenizer"):
        launch(new(tmp_path, old, **{"data.shards": shards}))


def test_weights_that_are_not_finite_are_refused(old, tmp_path, monkeypatch):
    origin = find_origin({"name": "x", "train": {"init_from": str(old), "output_dir": "o", "resume": None}})
    weights = {name: value.clone() for name, value in read_checkpoint(old)["model"].items()}
    next(iter(weights.values()))[0] = float("nan")
    monkeypatch.setattr("nested_learning.train.origin.read_checkpoint", lambda path: {"model": weights})
    with pytest.raises(CheckpointError, match="weights that are not finite, such as "):
        origin.put_weights(HopeLM(origin.config.model))


@pytest.fixture
def train(tmp_path, monkeypatch, capsys):
    """`train(*options)`: train.py in this process on a text of one line; exit code and stderr."""
    (tmp_path / "text.txt").write_text(WORDS * 80)
    places = [f"data.files=[{tmp_path / 'text.txt'}]", f"data.cache_dir={tmp_path / 'cache'}"]
    small = ["train.seq_len=16", "train.batch_size=2", "train.steps=1", "train.sample_tokens=0", "name=new"]
    quiet = [
        "train.device=cpu",
        "logging.progress=false",
        f"train.output_dir={tmp_path}",
        "train.eval_batches=1",
    ]

    def run(*options):
        monkeypatch.setattr("sys.argv", ["train.py", *places, *small, *quiet, *options])
        GlobalHydra.instance().clear()
        try:
            runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
        except SystemExit as end:
            return end.code, capsys.readouterr().err
        return None, capsys.readouterr().err

    return run


def test_the_command_line_needs_nothing_but_the_checkpoint(train, old, tmp_path):
    # the levels of the entry would be refused for train.seq_len = 16; those of the checkpoint are not
    assert train(f"train.init_from={old}", "optim.lr=1e-4") == (0, "")
    assert read_checkpoint(tmp_path / "new")["config"]["model"]["dim"] == 16


@pytest.mark.parametrize(
    "option, said",
    [
        ("model.dim=32", "model.dim=32 contradicts train.init_from = .*, in which model.dim is 16: .*"),
        (
            "model.levels.0.chunk_size=4",
            "in which model.levels is another: .*; leave out model.levels.0.chunk_s",
        ),
        ("levels=mlp", "levels=mlp contradicts .*; leave out levels$"),
        ("data.tokenizer.vocab_size=400", "in which data.tokenizer.vocab_size is 300: "),
    ],
)
def test_an_override_that_contradicts_the_checkpoint_is_one_line(train, old, tmp_path, option, said):
    code, line = train(f"train.init_from={old}", option)
    assert code == 2 and line.count("\n") == 1
    assert re.search(said, line.strip())
    assert not (tmp_path / "new").exists()


def test_an_override_that_says_the_same_is_allowed(train, old):
    assert train(f"train.init_from={old}", "model.dim=16", "data.tokenizer.kind=bpe")[0] == 0
