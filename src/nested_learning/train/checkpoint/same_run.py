"""Whether a run may go on from a checkpoint: what both must share, and what may be changed on purpose."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nested_learning.checks import field_names, unknown_key
from nested_learning.config import RunConfig
from nested_learning.data.tokenizer import Tokenizer
from nested_learning.train.checkpoint.errors import CheckpointError
from nested_learning.train.checkpoint.run_file import saved_config, saved_tokenizer

_ANEW = "; train.init_from=CHECKPOINT starts a new run with its weights"
_STATE = f"the optimizer's state depends on it{_ANEW}"
_PLACE = f"the place in the data depends on it{_ANEW}"
FIXED = {
    "model": "the weights are of that model",
    "data.tokenizer": "the weights are of its tokens",
    "seed": _PLACE,
    **dict.fromkeys(("train.batch_size", "train.seq_len", "data.loader"), _PLACE),
    **dict.fromkeys(("data.files", "data.shards", "data.valid_fraction"), _PLACE),
    **dict.fromkeys(("optim.name", "optim.m3.slow_weight", "optim.m3.second_moment"), _STATE),
    **dict.fromkeys(("optim.m3.adamw", "optim.m3.ns_dtype", "optim.delta_momentum.precondition"), _STATE),
    **dict.fromkeys(("optim.deep_momentum.hidden", "optim.deep_momentum.seed"), _STATE),
}
"""What no run can change on its way, and why not."""


def check_resume_with(names: Iterable[str]) -> None:
    """Refuse names in `train.resume_with` that are no fields, or fields that no run can change on its way.

    Raises:
        ValueError: the first such name.
    """
    known = set(field_names(RunConfig))
    for name in names:
        if name not in known:
            raise ValueError(f"train.resume_with: {unknown_key(name, RunConfig)}")
        for fixed, reason in FIXED.items():
            if _is_in(name, fixed) or _is_in(fixed, name):
                inside = "" if _is_in(name, fixed) else f"{fixed} is in it, and "
                raise ValueError(f"train.resume_with must not hold {name}: {inside}{reason}")


def check_same_run(
    run: dict[str, Any], path: Path, config: RunConfig, tokenizer: Tokenizer, text: str
) -> None:
    """Refuse to mix two runs: one goes on as if it had never stopped, but for `train.resume_with`.

    Args:
        run: the description in the checkpoint at `path`.
        config, tokenizer, text: of the run that is to go on; `text` is the corpus's fingerprint.

    Raises:
        CheckpointError: they differ, with all differences in one line.
    """
    old, new = (_what_decides(c) for c in (saved_config(run, path), config))
    wanted = [
        (name, f"{name} is {new_value!r}, was {old_value!r}")
        for name, old_value, new_value in _differences(old, new)
        if not any(_is_in(name, allowed) for allowed in config.train.resume_with)
    ]
    changeable = [name for name, _ in wanted if not any(_is_in(name, fixed) for fixed in FIXED)]
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


def _what_decides(config: RunConfig) -> dict[str, Any]:
    """The part of a configuration that a resumed run must share."""
    values = config.to_dict()
    train = {key: values["train"][key] for key in ("inner", "grad_through_write", "init_from")}
    learned = {"adapt": values["adapt"]} if config.train.inner == "online" else {}
    return {key: values[key] for key in ("model", "optim", "seed")} | {"train": train} | learned


def _is_in(name: str, section: str) -> bool:
    """Whether a dotted name is a section or in it."""
    return name == section or name.startswith(f"{section}.")


def _differences(old: Any, new: Any, name: str = "") -> list[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = dict.fromkeys([*old, *new])
        inside = [_differences(old.get(k), new.get(k), f"{name}.{k}" if name else k) for k in keys]
        return [difference for some in inside for difference in some]
    return [] if old == new else [(name, old, new)]
