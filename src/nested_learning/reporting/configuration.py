"""Configurations for people: what differs from the defaults, and what differs between runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nested_learning.levels import LevelSpec
from nested_learning.train.config import RunConfig


def fields_of(config: RunConfig) -> dict[str, str]:
    """All fields by their dotted names, as text."""
    found: dict[str, str] = {}
    _flatten(config.to_dict(), "", found)
    found["model.levels"] = "; ".join(describe_level(level) for level in config.model.levels)
    return found


def describe_level(level: LevelSpec) -> str:
    """The name of a level, and in brackets what it does not leave at its default."""
    default = LevelSpec()
    given = [
        f"{name}={_show(getattr(level, name))}"
        for name in LevelSpec.__dataclass_fields__
        if name != "name" and getattr(level, name) != getattr(default, name)
    ]
    return f"{level.name} ({', '.join(given)})" if given else level.name


def changed(config: RunConfig) -> list[tuple[str, str, str]]:
    """Fields with another value than the default: name, value, default."""
    defaults = fields_of(RunConfig())
    return [
        (name, value, defaults.get(name, "not there"))
        for name, value in fields_of(config).items()
        if value != defaults.get(name)
    ]


def differing(configs: Sequence[RunConfig | None]) -> list[tuple[str, list[str]]]:
    """Fields that are not the same in all configurations, with the value in each; names of runs left out.

    One that is not known has "?" everywhere, and makes no difference.
    """
    known = [{} if config is None else fields_of(config) for config in configs]
    names = dict.fromkeys(name for fields in known for name in fields)
    rows = []
    for name in names:
        values = [fields.get(name, "not there") if fields else "?" for fields in known]
        if name != "name" and len(set(values) - {"?"}) > 1:
            rows.append((name, values))
    return rows


def _flatten(values: Mapping[str, Any], where: str, found: dict[str, str]) -> None:
    for key, value in values.items():
        name = f"{where}.{key}" if where else key
        if isinstance(value, Mapping) and value:
            _flatten(value, name, found)
        else:
            found[name] = _show(value)


def _show(value: Any) -> str:
    """A value as it stands in a configuration file, more or less."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_show(part) for part in value) + "]"
    return str(value)
