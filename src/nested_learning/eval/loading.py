"""Loading a checkpoint for evaluation: its model, tokenizer, configuration, and identity."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch

from nested_learning.aliases import UNTRAINED, our_path
from nested_learning.config import load_config
from nested_learning.data.tokenizer import Tokenizer, load_tokenizer
from nested_learning.eval.fit import check_fit
from nested_learning.models.lm import HopeLM
from nested_learning.runtime import pick_device, set_seed
from nested_learning.train.checkpoint import (
    CheckpointError,
    CheckpointStore,
    find_checkpoint,
    load_checkpoint,
)
from nested_learning.train.checkpoint.manifest import MANIFEST
from nested_learning.train.config import RunConfig

BEST = ":best"
OUTPUT = Path("outputs/eval")


@dataclass(frozen=True, kw_only=True, slots=True)
class Loaded:
    """A checkpoint in memory. Its model is in evaluation mode and its parameters take no gradients.

    Args:
        model, tokenizer, config: what the checkpoint holds.
        sha256: of the exported file, or of the manifest of a folder, which holds the SHA-256 of its files.
        path: the file or folder that was read.
    """

    model: HopeLM
    tokenizer: Tokenizer
    config: RunConfig
    sha256: str
    path: Path

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def describe(self) -> dict[str, str]:
        """Name, path and SHA-256, as a result file holds them."""
        return {"name": self.config.name, "path": str(self.path), "sha256": self.sha256}

    def output(self, evaluation: str, given: Path | None = None) -> Path:
        """The result file of an evaluation: `given`, or a file in a folder for this checkpoint."""
        return given or OUTPUT / f"{self.config.name}-{self.sha256[:8]}" / f"{evaluation}.json"


def load(
    checkpoint: str | Path,
    config: str | Path | None = None,
    tokenizer_path: str | Path | None = None,
    device: torch.device | str = "cpu",
) -> Loaded:
    """Read a checkpoint for evaluation.

    Args:
        checkpoint: a run folder for its latest checkpoint (`folder:best` for the one with the lowest
            validation loss), a checkpoint folder, or a file made by `nl export`; "untrained": see
            `untrained`.
        config: a configuration file or a name in `configs/`, instead of the configuration in the checkpoint.
        tokenizer_path: a SentencePiece model, instead of the tokenizer in the checkpoint.
        device: such as "cpu" or "cuda:0".

    Raises:
        CheckpointError: no checkpoint there, a damaged one, or weights that do not fit configuration or
            tokenizer.
        ValueError: a device that is not there.
        FileNotFoundError: no such configuration or tokenizer.
    """
    device = pick_device(device, "--device")
    checkpoint = our_path(checkpoint)
    if checkpoint == UNTRAINED:
        return untrained(config, tokenizer_path, device)
    path = locate(checkpoint)
    tokenizer = None if tokenizer_path is None else load_tokenizer(tokenizer_path)
    own = None if config is None else load_config(config)
    if own is not None and tokenizer is not None and own.model.vocab_size != tokenizer.vocab_size:
        raise CheckpointError(
            f"--config {config} is for {own.model.vocab_size} tokens, "
            f"--tokenizer-path {tokenizer_path} has {tokenizer.vocab_size}"
        )
    check_fit(path, own, tokenizer)
    model, tokenizer, read = load_checkpoint(path, device, own, tokenizer)
    proof = path if path.is_file() else path / MANIFEST
    digest = hashlib.sha256(proof.read_bytes()).hexdigest()
    return Loaded(
        model=model.requires_grad_(False), tokenizer=tokenizer, config=read, sha256=digest, path=path
    )


def untrained(config: str | Path | None, tokenizer_path: str | Path | None, device: torch.device) -> Loaded:
    """The model of `config` before training, with the weights from which training would start.

    Its vocabulary is that of the tokenizer.

    Raises:
        ValueError: no configuration or no tokenizer.
        FileNotFoundError: see `load`.
    """
    if config is None or tokenizer_path is None:
        raise ValueError(f"--checkpoint {UNTRAINED} needs --config and --tokenizer-path")
    tokenizer = load_tokenizer(tokenizer_path)
    own = load_config(config, [f"data.tokenizer.vocab_size={tokenizer.vocab_size}"])
    set_seed(own.seed)
    model = HopeLM(own.model).to(device).eval().requires_grad_(False)
    described = json.dumps([own.to_dict(), tokenizer.fingerprint], sort_keys=True)
    digest = hashlib.sha256(described.encode()).hexdigest()
    return Loaded(model=model, tokenizer=tokenizer, config=own, sha256=digest, path=Path(UNTRAINED))


def locate(checkpoint: str | Path) -> Path:
    """The path of a checkpoint named as `outputs/run`, `outputs/run:best` or `model.safetensors`.

    Raises:
        CheckpointError: there is none, or no best one.
    """
    name = str(checkpoint)
    if not name.endswith(BEST) or Path(name).exists():
        return find_checkpoint(checkpoint)
    folder = Path(name.removesuffix(BEST))
    for directory in (folder, folder / "checkpoints"):
        if found := CheckpointStore(directory, 1).best():
            return found
    raise CheckpointError(f"there is no checkpoint with a validation loss at {folder}")
