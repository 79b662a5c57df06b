"""Whether a run may resume from a checkpoint: what both must share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nested_learning.data.tokenizer import Tokenizer
from nested_learning.train.checkpoint.errors import CheckpointError
from nested_learning.train.checkpoint.run_file import saved_config, saved_tokenizer
from nested_learning.train.config import RunConfig
from nested_learning.train.resume_with import FIXED, is_in


def check_same_run(
    run: dict[str, Any], path: Path, config: RunConfig, tokenizer: Tokenizer, text: str
) -> None:
    """Refuse to mix two runs: except for `train.resume_with`, a run resumes as if it had never stopped.

    Args:
        run: the description in the checkpoint at `path`.
        config, tokenizer, text: of the run that resumes; `text` is the corpus's fingerprint.

    Raises:
        CheckpointError: they differ, with all differences in one line.
    """
    old, new = (_deciding_values(c) for c in (saved_config(run, path), config))
    wanted = [
        (name, f"{name} is {new_value!r}, was {old_value!r}")
        for name, old_value, new_value in _differences(old, new)
        if not any(is_in(name, allowed) for allowed in config.train.resume_with)
    ]
    changeable = [name for name, _ in wanted if not any(is_in(name, fixed) for fixed in FIXED)]
    differing = [text for _, text in wanted]
    if saved_tokenizer(run, path).fingerprint != tokenizer.fingerprint:
        differing.append("the tokenizer is another one")
    if run.get("text", text) != text:  # not in checkpoints of earlier releases
        differing.append("the text (data.files or data.shards) is another one")
    if differing:
        changed = f"train.resume_with=[{','.join(changeable)}] goes on with new values, "
        raise CheckpointError(
            f"cannot resume from {path}: {'; '.join(differing)}; "
            f"{changed if len(changeable) == len(differing) else ''}"
            "train.resume=null starts anew, another name= keeps both"
        )


def _deciding_values(config: RunConfig) -> dict[str, Any]:
    """The part of a configuration that a resumed run must share."""
    values = config.to_dict()
    shared = ("precision", "inner", "grad_through_write", "init_from")
    train = {key: values["train"][key] for key in shared}
    learned = {"adapt": values["adapt"]} if config.train.inner == "online" else {}
    return {key: values[key] for key in ("model", "optim", "seed")} | {"train": train} | learned


def _differences(old: Any, new: Any, name: str = "") -> list[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = dict.fromkeys([*old, *new])
        inside = [_differences(old.get(k), new.get(k), f"{name}.{k}" if name else k) for k in keys]
        return [difference for some in inside for difference in some]
    return [] if old == new else [(name, old, new)]
