"""From a checkpoint folder to one file."""

from __future__ import annotations

from pathlib import Path

from nested_learning.train.checkpoint.read import read_checkpoint
from nested_learning.train.checkpoint.single_file import write_single_file


def export_checkpoint(path: str | Path, output: str | Path | None = None) -> Path:
    """Write the weights of a checkpoint, with its configuration and tokenizer, to one safetensors file.

    Args:
        path: a checkpoint folder, or a run directory for its latest checkpoint.
        output: the file; None = `model.safetensors` in `path`.

    Returns:
        The file; `load_checkpoint` reads it.

    Raises:
        CheckpointError: see `read_checkpoint`.
        ValueError: a suffix other than .safetensors.
    """
    target = Path(path) / "model.safetensors" if output is None else Path(output)
    if target.suffix != ".safetensors":
        raise ValueError(f"output must end in .safetensors, got {target}")
    run = read_checkpoint(path)
    write_single_file(target, run["model"], run)
    return target
