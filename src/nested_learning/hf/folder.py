"""From a checkpoint to a folder that transformers reads."""

from __future__ import annotations

from pathlib import Path

from transformers import GenerationConfig

from nested_learning.extras import own_version
from nested_learning.hf.config import HopeForCausalLMConfig
from nested_learning.hf.model import HopeForCausalLM
from nested_learning.hf.tokenizer import HopeTokenizer
from nested_learning.train.checkpoint import CheckpointError, find_checkpoint, load_checkpoint
from nested_learning.train.checkpoint.read import read_description


def export_folder(path: str | Path, folder: str | Path) -> Path:
    """Write a checkpoint as a folder for `AutoModelForCausalLM` and `AutoTokenizer`, with a model card.

    Args:
        path: a checkpoint folder, an exported file, or a run directory for its latest checkpoint.
        folder: new or empty.

    Raises:
        CheckpointError: see `load_checkpoint`.
        ValueError: the folder holds something, or is a file.
    """
    folder = Path(folder)
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise ValueError(f"the folder for transformers must be new or empty, got {folder}")
    found = find_checkpoint(path)
    own, tokenizer, run = load_checkpoint(found)
    about = read_description(found)
    training = {
        "name": run.name,
        "steps": about["step"],
        "tokens": about["step"] * run.train.batch_size * run.train.seq_len,
        **{name: round(value, 4) for name, value in about["metrics"].items() if name != "step"},
        "version": own_version(),
    }
    ends = {"eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.eos_id}
    model = HopeForCausalLM(HopeForCausalLMConfig(hope=own.config, training=training, **ends))
    model.model.load_state_dict(own.state_dict(), assign=True)
    model.generation_config = GenerationConfig(**ends)
    try:
        model.save_pretrained(folder)
        HopeTokenizer.of(tokenizer).save_pretrained(folder)
    except OSError as error:
        raise CheckpointError(f"cannot write {folder}: {error}") from error
    return folder
