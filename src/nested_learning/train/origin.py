"""The checkpoint that gives a new run its weights, model and tokenizer (`train.init_from`)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from hydra.core.override_parser.overrides_parser import OverridesParser

from nested_learning.data.tokenizer import Tokenizer
from nested_learning.levels import kind_of
from nested_learning.models.lm import HopeLM
from nested_learning.train.checkpoint import (
    CheckpointError,
    CheckpointStore,
    find_checkpoint,
    put_weights,
    read_checkpoint,
    read_description,
    saved_config,
    saved_tokenizer,
)
from nested_learning.train.config import RunConfig

MODEL_GROUPS = ("model", "size", "levels", "experiment")
"""Groups of `configs/` whose entries set fields of the model."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """The checkpoint at `path`, with the configuration and tokenizer in it."""

    path: Path
    config: RunConfig
    tokenizer: Tokenizer

    def adopt(self, values: dict[str, Any], overrides: Iterable[str] = ()) -> dict[str, Any]:
        """The plain `values` of a run, with its model and tokenizer replaced by those of the checkpoint.

        `train.seq_len` stays the run's own, where no level becomes another kind of level by it.

        Args:
            values: with all sections.
            overrides: of the command line.

        Raises:
            ValueError: an override asks for another model or tokenizer than the checkpoint's, or the model
                does not take `train.seq_len`.
        """
        self._check_length(values["train"]["seq_len"])
        model, tokenizer = self.config.model.to_dict(), asdict(self.config.data.tokenizer)
        if model["seq_len"] is not None:
            model["seq_len"] = values["train"]["seq_len"]
        given = _flat({"model": values["model"], "data": {"tokenizer": values["data"]["tokenizer"]}})
        own = _flat({"model": model, "data": {"tokenizer": tokenizer}})
        self._check_overrides(overrides, {n: v for n, v in own.items() if given.get(n) != v})
        return {**values, "model": model, "data": {**values["data"], "tokenizer": tokenizer}}

    def put_weights(self, model: HopeLM) -> None:
        """Give `model` the checkpoint's weights.

        Raises:
            CheckpointError: they cannot be read, do not fit or are not finite.
        """
        weights = read_checkpoint(self.path)["model"]
        if bad := [name for name, value in weights.items() if not torch.isfinite(value).all()]:
            raise CheckpointError(f"checkpoint {self.path} has weights that are not finite, such as {bad[0]}")
        put_weights(model, weights, self.path)

    def _check_length(self, length: int) -> None:
        """Refuse a sequence length that would change the kind of a level."""
        before = self.config.model.seq_len
        for level in self.config.model.levels:
            was, becomes = kind_of(level, before), kind_of(level, before and length)
            if was != becomes:
                raise ValueError(
                    f"train.seq_len = {length} would make level {level.name} {becomes}, which is {was} in "
                    f"train.init_from = {self.path}, trained with {before}"
                )

    def _check_overrides(self, overrides: Iterable[str], differing: dict[str, Any]) -> None:
        """Refuse an override of a field in `differing`: name → its value in the checkpoint."""
        parser = OverridesParser.create()
        for override in map(parser.parse_override, overrides):
            key = override.key_or_group
            section = "model" if key in MODEL_GROUPS else key
            if found := sorted(name for name in differing if _touch(name, section)):
                value = "another" if isinstance(differing[found[0]], list) else differing[found[0]]
                raise ValueError(
                    f"{override.input_line} contradicts train.init_from = {self.path}, in which "
                    f"{found[0]} is {value}: its model and tokenizer stay as they are; leave out {key}"
                )


def find_origin(values: dict[str, Any]) -> Origin | None:
    """The origin of a run, by the plain values of its configuration; None without `train.init_from`.

    A resumed run takes model and tokenizer from its own checkpoints; then `train.init_from` is only compared
    with the value it had.

    Raises:
        CheckpointError: there is no such checkpoint, or it cannot be read.
        ValueError: it is one of the run itself.
    """
    train = values["train"]
    if train["init_from"] is None:
        return None
    run_dir = Path(train["output_dir"]) / values["name"]
    if Path(train["init_from"]).resolve().is_relative_to(run_dir.resolve()):
        raise ValueError(
            f"train.init_from = {train['init_from']} belongs to this run itself, {run_dir}; "
            "give the new run a name= of its own"
        )
    path = _own_checkpoint(run_dir, train["resume"]) or find_checkpoint(train["init_from"])
    run = read_description(path)
    return Origin(path=path, config=saved_config(run, path), tokenizer=saved_tokenizer(run, path))


def _own_checkpoint(run_dir: Path, resume: str | None) -> Path | None:
    """The newest checkpoint with a description among those that the run would resume from."""
    if resume is None:
        return None
    if resume != "auto":
        return find_checkpoint(resume)
    for folder in CheckpointStore(run_dir / "checkpoints", 1).newest_first():
        try:
            read_description(folder)
        except CheckpointError:  # reported by the later search for a whole one
            continue
        return folder
    return None


def _flat(values: dict[str, Any], name: str = "") -> dict[str, Any]:
    """Dotted names → values, without the dictionaries themselves; tuples become lists."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{name}{key}.")
        else:
            flat[f"{name}{key}"] = _lists(value)
    return flat


def _lists(value: Any) -> Any:
    """Tuples as lists, however deep."""
    if isinstance(value, dict):
        return {key: _lists(item) for key, item in value.items()}
    return [_lists(item) for item in value] if isinstance(value, list | tuple) else value


def _touch(name: str, section: str) -> bool:
    """Whether two dotted names are the same, or one is a section that holds the other."""
    return name == section or name.startswith(f"{section}.") or section.startswith(f"{name}.")
