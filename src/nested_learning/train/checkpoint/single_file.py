"""One self-describing safetensors file: weights, and in its header configuration, tokenizer and step."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

from torch import Tensor

from nested_learning.train.checkpoint.errors import CheckpointError, cause
from nested_learning.train.checkpoint.run_file import KINDS, check_kinds, read_plain

KEY = "nested_learning"
FORMAT = 1
PARTS = ("step", "config", "tokenizer", "metrics")


def write_single_file(path: Path, weights: dict[str, Tensor], run: dict[str, Any]) -> None:
    """Write `weights` and what `run` says of them ("step", "config", "tokenizer", "metrics").

    Raises:
        CheckpointError: the file cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    about = {"format": FORMAT, **{key: run[key] for key in PARTS}}
    header = {KEY: json.dumps(about, default=_pack_bytes), "format": "pt"}
    scrap = path.with_name(path.name + ".part")
    try:
        save_file({name: t.contiguous() for name, t in weights.items()}, scrap, metadata=header)
        scrap.replace(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write {path}: {error}") from error
    finally:
        if scrap.is_file():
            scrap.unlink()


def read_single_file(path: Path) -> dict[str, Any]:
    """Its description, and the tensors as "model".

    Raises:
        CheckpointError: not such a file, or a damaged one.
    """
    tensors: dict[str, Tensor] = {}
    return {**read_description(path, tensors), "model": tensors}


def read_description(path: Path, tensors: dict[str, Tensor] | None = None) -> dict[str, Any]:
    """What its header says of the run ("step", "config", "tokenizer", "metrics").

    Args:
        path: a file of `write_single_file`.
        tensors: gets the weights, by name; None leaves them unread.

    Raises:
        CheckpointError: not such a file, or a damaged one.
    """
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            if tensors is not None:
                tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:  # safetensors raises a type of its own
        if _is_first_format(path):
            raise CheckpointError(
                f"{path} is a checkpoint of format 1, which this code does not read"
            ) from error
        raise CheckpointError(f"checkpoint {path} is truncated or corrupt: {error}") from error
    if KEY not in header:
        raise CheckpointError(f"checkpoint {path} was not written by nl export: it describes no model")
    try:
        about = dict(json.loads(header[KEY], object_hook=_unpack_bytes))
    except (ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"the description in {path} is damaged: {cause(error)}") from error
    if about.get("format") != FORMAT:
        raise CheckpointError(
            f"checkpoint {path} has format version {about.get('format')}; this code reads {FORMAT}"
        )
    check_kinds(about, {key: KINDS[key] for key in PARTS}, path)
    return about


def _is_first_format(path: Path) -> bool:
    """Whether a file is a checkpoint as the first release wrote them, with `torch.save`."""
    try:
        return read_plain(path).get("version") == 1
    except CheckpointError:
        return False


def _pack_bytes(value: object) -> Any:
    if isinstance(value, bytes):
        return {"base64": base64.b64encode(value).decode()}
    raise TypeError(f"{type(value).__name__} has no place in a header")


def _unpack_bytes(value: dict[str, Any]) -> Any:
    return base64.b64decode(value["base64"]) if value.keys() == {"base64"} else value
