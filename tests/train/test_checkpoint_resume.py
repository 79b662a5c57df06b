"""Going on where the newest checkpoint is of no use or of another text, or where nothing can be written."""

import os
import re
import warnings
from dataclasses import replace

import pytest
import torch
from tiny import tiny_config
from torch import nn
from torch.distributed.checkpoint import FileSystemReader, load
from torch.optim import SGD

from nested_learning.commands import nl
from nested_learning.data.config import TokenizerConfig
from nested_learning.data.corpus import prepare_corpus
from nested_learning.data.tokenizer import ByteTokenizer
from nested_learning.train.checkpoint import (
    CheckpointError,
    CheckpointStore,
    export_checkpoint,
    find_checkpoint,
    read_checkpoint,
    verify,
)
from nested_learning.train.checkpoint.manifest import write_manifest
from nested_learning.train.checkpoint.tensors import pack, write_tensors
from nested_learning.train.launch import begin, find_resume
from nested_learning.train.strategy import OneProcess
from nested_learning.train.trainer import Trainer


def prepare_run_dir(config):
    """What a start does with the run directory once the run is built."""
    resume = find_resume(config)
    begin(config, CheckpointStore(config.run_dir / "checkpoints", 1), resume)
    return resume


@pytest.fixture
def saved(make_trainer):
    """A run of four steps with checkpoints after 1, 2, 3 and 4."""
    trainer = make_trainer(steps=4, save_every=1, keep_last=4)
    trainer.fit()
    return trainer


def step(trainer, number):
    return trainer.store.directory / f"step_{number:08d}"


def cut(folder):
    file = folder / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-100])


def forget_manifest(folder):
    (folder / "manifest.json").unlink()


def not_finite(folder):
    """Write the checkpoint anew with one weight that is NaN."""
    reader = FileSystemReader(folder)
    tensors = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in reader.read_metadata().state_dict_metadata.items()
    }
    load(tensors, storage_reader=reader)
    tensors["model/head.weight"][3, 5] = float("nan")
    (folder / ".metadata").unlink()
    write_tensors(folder, tensors)
    write_manifest(folder)


DAMAGE = [
    (cut, r"step_00000004 is corrupt: __0_0.distcp has \d+ bytes"),
    (forget_manifest, "step_00000004 has no readable manifest.json"),
    (not_finite, "step_00000004 has weights that are not finite"),
]


@pytest.mark.parametrize("damage, said", DAMAGE)
def test_going_on_takes_the_newest_whole_one_and_says_so(saved, capsys, damage, said):
    damage(step(saved, 4))
    cut(step(saved, 3))
    assert find_resume(saved.config) == step(saved, 2)
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and line.endswith(f"; going back to {step(saved, 2)}\n")
    assert re.search(said, line)


@pytest.mark.parametrize("damage, said", DAMAGE)
def test_a_damaged_one_that_was_asked_for_is_refused_and_a_whole_one_named(saved, make_trainer, damage, said):
    damage(step(saved, 4))
    advice = f"; train.resume={step(saved, 3)} resumes from the newest whole one$"
    with pytest.raises(CheckpointError, match=f"{said}.*{advice}"):
        make_trainer(resume=step(saved, 4))


def test_going_back_ends_where_an_undisturbed_run_does(saved, make_trainer):
    cut(step(saved, 4))
    again = make_trainer(resume=saved.store.newest_whole(), steps=4, save_every=1, keep_last=4)
    assert again.step == 3
    again.fit()
    assert verify(step(saved, 4)) == []
    for a, b in zip(saved.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_without_a_whole_one_the_run_does_not_start_anew(saved):
    for folder in saved.store.folders():
        cut(folder)
    with pytest.raises(
        CheckpointError, match=r"step_00000004 is corrupt.*no other is whole; train.resume=null"
    ):
        find_resume(saved.config)
    assert len(saved.store.folders()) == 4
    anew = replace(saved.config, train=replace(saved.config.train, resume=None))
    assert find_resume(anew) is None
    begin(anew, saved.store, None)
    assert saved.store.folders() == []


def test_reading_a_damaged_one_names_a_whole_one(saved, capsys):
    cut(step(saved, 4))
    whole = f"the newest whole one is {step(saved, 3)}"
    with pytest.raises(CheckpointError, match=f"{whole}$"):
        read_checkpoint(saved.config.run_dir)
    assert nl.main(["verify-checkpoint", str(saved.config.run_dir)]) == 1
    assert whole in capsys.readouterr().out


def test_another_text_of_the_same_length_is_refused(saved, corpus):
    other = corpus.train.copy()
    other[7] += 1
    with pytest.raises(CheckpointError, match=r"the text \(data.files or data.shards\) is another one"):
        Trainer(
            saved.config,
            type(saved.model)(),
            replace(corpus, train=other),
            OneProcess(),
            saved.store.latest(),
        )
    run = torch.load(step(saved, 4) / "run.pt", weights_only=True)
    del run["text"]  # an earlier release
    torch.save(run, step(saved, 4) / "run.pt")
    write_manifest(step(saved, 4))
    Trainer(saved.config, type(saved.model)(), corpus, OneProcess(), saved.store.latest())


def test_the_fingerprint_of_text_files_is_of_what_they_hold(tmp_path):
    def fingerprint(name, text, tokenizer):
        (tmp_path / name).write_text(text)
        return prepare_corpus([tmp_path / name], tokenizer, tmp_path / "cache").fingerprint

    text = "one two three four five six\n" * 50
    first = fingerprint("a.txt", text, ByteTokenizer())
    assert fingerprint("b.txt", text, TokenizerConfig(kind="byte", vocab_size=257)) == first
    assert fingerprint("a.txt", text.replace("five", "nine", 1), ByteTokenizer()) != first


def test_a_folder_that_cannot_be_made_or_written_to_is_one_line(tmp_path, monkeypatch):
    config = tiny_config(tmp_path, "run")
    config.run_dir.write_text("a file")
    with pytest.raises(CheckpointError, match=f"cannot keep checkpoints in {config.run_dir}/checkpoints: "):
        find_resume(config)
    other = tiny_config(tmp_path, "other")
    (other.run_dir / "checkpoints").mkdir(parents=True)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(CheckpointError, match="no permission to write"):
        find_resume(other)


@pytest.mark.parametrize("place", ["", "checkpoints", "checkpoints/step_00000004"])
def test_an_export_goes_beside_the_checkpoint(saved, make_trainer, place):
    target = export_checkpoint(saved.config.run_dir / place)
    assert target == step(saved, 4).with_suffix(".safetensors") and target.is_file()
    assert sorted(p.name for p in step(saved, 4).iterdir()) == [
        *(".metadata", "__0_0.distcp", "manifest.json", "random_00000.pt", "run.pt")
    ]
    assert verify(step(saved, 4)) == []
    assert find_checkpoint(saved.config.run_dir) == step(saved, 4)
    make_trainer(resume=find_resume(saved.config))


def test_an_export_into_a_checkpoint_or_of_an_exported_file_is_refused(saved, tmp_path):
    with pytest.raises(ValueError, match="output must be outside of the checkpoint folder"):
        export_checkpoint(saved.config.run_dir, step(saved, 4) / "x.safetensors")
    with pytest.raises(CheckpointError, match="is one file already"):
        export_checkpoint(export_checkpoint(saved.config.run_dir))
    (tmp_path / "file").write_text("?")
    with pytest.raises(CheckpointError, match=r"cannot write .*x.safetensors"):
        export_checkpoint(saved.config.run_dir, tmp_path / "file" / "x.safetensors")


def test_saving_in_the_background_warns_of_nothing(tmp_path):
    model = nn.Linear(2, 2)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for number in range(2):
            tensors, _ = pack(model, SGD(model.parameters()))
            write_tensors(tmp_path / str(number), tensors, background=True).result()
    assert [str(warning.message) for warning in said] == []
