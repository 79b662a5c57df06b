"""Checks of configuration values. Each refuses in one line: the field, what is allowed, and the value."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

T = TypeVar("T")


def one_of(name: str, value: str, allowed: Iterable[str]) -> None:
    """Raise ValueError unless `value` is one of `allowed`."""
    allowed = tuple(allowed)
    if value not in allowed:
        raise ValueError(
            f"{name} must be one of {', '.join(allowed)}, got {value!r}{did_you_mean(value, allowed)}"
        )


def at_least(name: str, value: float | None, least: float) -> None:
    """Raise ValueError if `value` is below `least`. None passes: the field is optional."""
    if value is not None and not value >= least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def positive(name: str, value: float | None) -> None:
    """Raise ValueError unless `value` is above 0. None passes: the field is optional."""
    if value is not None and not value > 0:
        raise ValueError(f"{name} must be positive, got {value}")


def within(name: str, value: float | None, interval: str) -> None:
    """Raise ValueError unless `value` lies in `interval`, such as "[0, 1)". None passes."""
    low, high = (float(end) for end in interval[1:-1].split(","))
    if value is None:
        return
    above = value >= low if interval[0] == "[" else value > low
    below = value <= high if interval[-1] == "]" else value < high
    if not (above and below):
        raise ValueError(f"{name} must be in {interval}, got {value}")


def check_types(config: Any, where: str) -> None:
    """Give every field of the dataclass `config` its declared type, in place.

    Lists become tuples, whole numbers become floats where a float is declared, and dictionaries become the
    declared dataclass. Numbers must be finite.

    Args:
        config: an instance of a dataclass.
        where: its name in a configuration, such as "optim"; errors name `where.field`.

    Raises:
        ValueError: a value of another type or length, or a number that is not finite.
    """
    for name, hint in _hints(type(config)).items():
        setattr(config, name, _cast(_join(where, name), getattr(config, name), hint))


def build(kind: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """An instance of the dataclass `kind` from plain values, nested ones included.

    Raises:
        ValueError: a key that `kind` does not have or that is missing, or a value that is not allowed.
    """
    built: T = _cast(where, dict(values), kind)
    return built


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A question to append to an error about an unknown name, or "" if no known name is near."""
    near = get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def near_path(path: Path) -> str:
    """A question to append to an error about a path that is not there, or "" if its folder has none near."""
    folder = path.absolute().parent
    known = [one.name for one in folder.iterdir()] if folder.is_dir() else []
    return did_you_mean(path.name, [name for name in known if name != path.name])


def unknown_key(key: str, kind: Any, where: str = "") -> str:
    """An error message for a dotted `key` that the dataclass `kind`, found at `where`, does not have."""
    beside = key.rpartition(".")[0]
    known = list(field_names(kind, where))
    siblings = [name.rpartition(".")[2] for name in known if name.rpartition(".")[0] == beside]
    return f"unknown key {key!r}{did_you_mean(key, known)}; allowed there: {', '.join(siblings)}"


def field_names(kind: Any, where: str = "") -> Iterator[str]:
    """The dotted names of all fields of a dataclass and of the dataclasses in it."""
    for name, hint in _hints(kind).items():
        yield _join(where, name)
        for part in (hint, *get_args(hint)):
            if is_dataclass(part):
                yield from field_names(part, _join(where, name))


def _join(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def _hints(kind: Any) -> dict[str, Any]:
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in fields(kind)}


def _cast(name: str, value: Any, hint: Any) -> Any:
    """`value` as `hint` declares it, or a ValueError."""
    if isinstance(hint, UnionType):  # only `X | None` is used
        if value is None:
            return None
        (hint,) = (kind for kind in get_args(hint) if kind is not NoneType)
    if get_origin(hint) is tuple:
        return _cast_tuple(name, value, get_args(hint))
    if is_dataclass(hint):
        return _cast_dataclass(name, value, hint)
    if hint is float:
        return _cast_float(name, value)
    wanted = {int: "a whole number", bool: "true or false", str: "a text"}.get(hint)
    if wanted and (not isinstance(value, hint) or (hint is int and isinstance(value, bool))):
        raise ValueError(f"{name} must be {wanted}, got {value!r}")
    return value


def _cast_float(name: str, value: Any) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value!r}")
    return float(value)


def _cast_tuple(name: str, value: Any, kinds: tuple[Any, ...]) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise ValueError(f"{name} must be a list, got {value!r}")
    if kinds[-1] is Ellipsis:
        kinds = kinds[:1] * len(value)
    if len(value) != len(kinds):
        raise ValueError(f"{name} must hold {len(kinds)} values, got {list(value)!r}")
    return tuple(_cast(f"{name}[{i}]", v, kind) for i, (v, kind) in enumerate(zip(value, kinds, strict=True)))


def _cast_dataclass(name: str, value: Any, kind: Any) -> Any:
    if isinstance(value, kind):
        return value
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be a mapping, got {value!r}")
    for key in value:
        if key not in _hints(kind):
            raise ValueError(f"{unknown_key(_join(name, str(key)), kind, name)}")
    for field in fields(kind):
        if field.default is MISSING and field.default_factory is MISSING and field.name not in value:
            raise ValueError(f"{_join(name, field.name)} is missing")
    return kind(**value)
