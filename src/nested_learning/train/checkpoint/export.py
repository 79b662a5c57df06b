"""From a checkpoint folder to one file."""

from __future__ import annotations

from pathlib import Path

from nested_learning.train.checkpoint.errors import CheckpointError
from nested_learning.train.checkpoint.read import read_checkpoint
from nested_learning.train.checkpoint.single_file import write_single_file
from nested_learning.train.checkpoint.store import find_checkpoint


def export_checkpoint(path: str | Path, output: str | Path | None = None) -> Path:
    """Write the weights of a checkpoint, with its configuration and tokenizer, to one safetensors file.

    Args:
        path: a checkpoint folder, or a run directory for its latest checkpoint.
        output: the file, outside of the checkpoint folder; None = beside that folder, under its name.

    Returns:
        The file; `load_checkpoint` reads it.

    Raises:
        CheckpointError: see `read_checkpoint`; an exported file; the output cannot be written.
        ValueError: a suffix other than .safetensors, or a place inside of the checkpoint.
    """
    folder = find_checkpoint(path)
    if folder.is_file():
        raise CheckpointError(f"{folder} is one file already; only checkpoint folders are exported")
    beside = folder.absolute().with_name(f"{folder.absolute().name}.safetensors")
    target = beside if output is None else Path(output)
    if target.suffix != ".safetensors":
        raise ValueError(f"output must end in .safetensors, got {target}")
    if target.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"output must be outside of the checkpoint folder {folder}, got {target}")
    run = read_checkpoint(folder)
    write_single_file(target, run["model"], run)
    return target
