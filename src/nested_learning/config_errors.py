"""What Hydra and OmegaConf raise about files and overrides, as errors of one line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, cast

import yaml
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from nested_learning.checks import did_you_mean, unknown_key
from nested_learning.train.config import RunConfig


def plain_values(values: DictConfig) -> dict[str, Any]:
    """OmegaConf's values as a dictionary, interpolations resolved; ValueError where one cannot be."""
    try:
        return cast(dict[str, Any], OmegaConf.to_container(values, resolve=True))
    except OmegaConfBaseException as error:
        raise ValueError(one_line(error)) from error


@contextmanager
def composing(overrides: list[str]) -> Iterator[None]:
    """Turn every error of Hydra and OmegaConf about files and `overrides` into a ValueError of one line."""
    try:
        yield
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise ValueError(one_line(error)) from error
    except (ValueError, AttributeError, TypeError, LookupError) as error:  # Hydra's, of odd overrides
        what = " ".join(overrides) or "the configuration"
        raise ValueError(f"cannot apply {what}: {one_line(error)}") from error


def one_line(error: BaseException) -> str:
    """The message of an error of Hydra or OmegaConf with its reason, which the error's cause holds."""
    cause = error.__cause__
    if isinstance(cause, ConfigKeyError | ConfigAttributeError) and cause.full_key:
        key = str(cause.full_key)
        if is_dataclass(cause.object_type):
            return unknown_key(key, cause.object_type, key.rpartition(".")[0])
        return unknown_key(key, RunConfig)
    if isinstance(error, MissingConfigException):
        known = sorted(Path(option).name for option in error.options or [])
        near = did_you_mean(Path(error.missing_cfg_file or "").name, known)
        there = f"; there are {', '.join(known)}" if known else ""
        return f"there is no configuration {error.missing_cfg_file!r}{near}{there}"
    where = next((w for e in (error, cause) for w in (_place(e),) if w), "")
    wrong = re.search(
        r"Value '(.*)' of type '\w+' could not be converted to (Float|Integer)", str(cause or error)
    )
    if wrong and where:
        kind = "a finite number" if wrong[2] == "Float" else "a whole number"
        return f"{where.partition('=')[0]} must be {kind}, got {wrong[1]!r}"
    what, *more = str(error).strip().split("\n")
    why = str(cause).split("\n")[0] if cause else next((line for line in more if line[:1].strip()), "")
    return ": ".join(part for part in ("" if where in what else where, what, why) if part)


def _place(error: BaseException | None) -> str:
    """The key or the override that an error of Hydra or OmegaConf is about."""
    key = re.search(r"full_key: (\S+)", str(error))
    return key[1] if key else getattr(error, "override", None) or ""
