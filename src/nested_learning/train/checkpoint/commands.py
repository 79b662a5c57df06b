"""`nl verify-checkpoint` and `nl export`."""

from __future__ import annotations

import argparse

from nested_learning.train.checkpoint.errors import CheckpointError
from nested_learning.train.checkpoint.export import export_checkpoint
from nested_learning.train.checkpoint.manifest import foreign, verify
from nested_learning.train.checkpoint.store import find_checkpoint, other_whole


def add_verify_to(parser: argparse.ArgumentParser) -> None:
    """Options of `nl verify-checkpoint`."""
    parser.add_argument("path", help="a checkpoint folder, or a run directory for its latest one")
    parser.set_defaults(run=run_verify)


def run_verify(options: argparse.Namespace) -> int:
    """Print what is wrong; 1 if anything is.

    Raises:
        CheckpointError: there is no checkpoint, or one without a manifest.
    """
    path = find_checkpoint(options.path)
    if path.is_file():
        raise CheckpointError(f"{path} is an exported file; only checkpoint folders have a manifest")
    problems = verify(path)
    lines = [f"{path} is damaged:", *problems] if problems else [f"{path}: every file is as written"]
    lines += [f"{name} is not of this checkpoint" for name in foreign(path)]
    if problems and (other := other_whole(path)):
        lines.append(f"the newest whole one is {other}")
    print("\n".join(lines))
    return 1 if problems else 0


def add_export_to(parser: argparse.ArgumentParser) -> None:
    """Options of `nl export`."""
    parser.add_argument("path", help="a checkpoint folder, or a run directory for its latest one")
    parser.add_argument("--output", help="a .safetensors file; beside the checkpoint folder if left out")
    parser.set_defaults(run=run_export)


def run_export(options: argparse.Namespace) -> int:
    """Write one self-describing file."""
    target = export_checkpoint(options.path, options.output)
    print(f"{target}: {target.stat().st_size / 2**20:.1f} MiB; load_checkpoint reads it")
    return 0
