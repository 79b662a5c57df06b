"""One self-describing safetensors file: weights, and in its header configuration, tokenizer and step."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

from torch import Tensor

from nested_learning.train.checkpoint.errors import CheckpointError

KEY = "nested_learning"
FORMAT = 1


def write_single_file(path: Path, weights: dict[str, Tensor], run: dict[str, Any]) -> None:
    """Write `weights` and what `run` says of them ("step", "config", "tokenizer", "metrics")."""
    from safetensors.torch import save_file

    about = {"format": FORMAT, **{key: run[key] for key in ("step", "config", "tokenizer", "metrics")}}
    header = {KEY: json.dumps(about, default=_pack_bytes), "format": "pt"}
    scrap = path.with_name(path.name + ".tmp")
    save_file({name: t.contiguous() for name, t in weights.items()}, scrap, metadata=header)
    scrap.replace(path)


def read_single_file(path: Path) -> dict[str, Any]:
    """Its description, and the tensors as "model".

    Raises:
        CheckpointError: not such a file, or a damaged one.
    """
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:  # safetensors raises a type of its own
        raise CheckpointError(f"checkpoint {path} is truncated or corrupt: {error}") from error
    if KEY not in header:
        raise CheckpointError(f"checkpoint {path} was not written by nl export: it describes no model")
    about = dict(json.loads(header[KEY], object_hook=_unpack_bytes))
    if about.get("format") != FORMAT:
        raise CheckpointError(
            f"checkpoint {path} has format version {about.get('format')}; this code reads {FORMAT}"
        )
    return {**about, "model": tensors}


def _pack_bytes(value: object) -> Any:
    if isinstance(value, bytes):
        return {"base64": base64.b64encode(value).decode()}
    raise TypeError(f"{type(value).__name__} has no place in a header")


def _unpack_bytes(value: dict[str, Any]) -> Any:
    return base64.b64decode(value["base64"]) if value.keys() == {"base64"} else value
