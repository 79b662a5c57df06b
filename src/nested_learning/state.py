"""Explicit state: everything that changes while a sequence is read.

Weights that adapt inside a sequence are state, never parameters. A state is a frozen dataclass whose
fields are batch-first tensors, ints, further states, tuples of these, or None. Functions take a state
and hand back a new one, and what the given one says stays as it is. (Without gradients, the cache of
attention writes new tokens into spare room of a buffer that older states share; they do not see them.)

    y, state = layer(x, state)        # state=None means "start of a context"
"""

from __future__ import annotations

import dataclasses
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from importlib import import_module
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.utils._pytree import GetAttrKey, register_pytree_node

from nested_learning.checks import near_path

FORMAT, VERSION = "nested_learning.state", 2  # of files
DEFINING = ("nested_learning.models.lm", "nested_learning.models.pretrained")
"""Modules whose import defines every state of the package; imported when a file holds an unknown one."""
TensorFn = Callable[[Tensor], Tensor]


def _map(value: Any, fn: TensorFn) -> Any:
    if isinstance(value, Tensor):
        return fn(value)
    if isinstance(value, State):
        return value.map(fn)
    if isinstance(value, tuple):
        return tuple(_map(item, fn) for item in value)
    return value


def _named(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    for key, part in _parts(value):
        yield from _named(part, f"{name}.{key}" if name else key)


def _parts(value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, State):
        return [(f.name, getattr(value, f.name)) for f in dataclasses.fields(value)]
    return [(str(i), part) for i, part in enumerate(value)] if isinstance(value, tuple) else []


def _children(value: Any, name: str = "") -> Iterator[tuple[str, State]]:
    for key, part in _parts(value):
        inner = f"{name}.{key}" if name else key
        if isinstance(part, State):
            yield inner, part
        else:
            yield from _children(part, inner)


def _replace(value: Any, new: Mapping[str, Tensor], name: str) -> Any:
    """`value`, itself where nothing below it is replaced."""
    if name in new:
        return new[name]
    if not any(key.startswith(f"{name}." if name else "") for key in new):
        return value
    parts = {key: _replace(part, new, f"{name}.{key}" if name else key) for key, part in _parts(value)}
    return tuple(parts.values()) if isinstance(value, tuple) else dataclasses.replace(value, **parts)


def _pack(value: Any) -> Any:
    if isinstance(value, State):
        fields = {f.name: _pack(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"state": type(value).__name__, "fields": fields}
    if isinstance(value, tuple):
        return [_pack(item) for item in value]
    return value


def _unpack(value: Any) -> Any:
    if isinstance(value, dict):
        kind, values = value["state"], value["fields"]
        if kind not in State.kinds:
            for module in DEFINING:
                import_module(module)
        if kind not in State.kinds:
            raise ValueError(f"holds a {kind}, which nothing that is imported defines")
        fields = dataclasses.fields(State.kinds[kind])
        needed = {f.name for f in fields if f.default is dataclasses.MISSING}
        if wrong := sorted(needed - values.keys() | values.keys() - {f.name for f in fields}):
            verb = "lacks" if wrong[0] in needed else "has an unknown"
            raise ValueError(f"is of another version: its {kind} {verb} field {wrong[0]!r}")
        return State.kinds[kind](**{name: _unpack(item) for name, item in values.items()})
    if isinstance(value, list):
        return tuple(_unpack(item) for item in value)
    return value


def _is_plain(value: Any) -> bool:
    """Whether a field is a number, a name, or a tuple of these."""
    if isinstance(value, tuple):
        return bool(value) and all(map(_is_plain, value))
    return isinstance(value, (int, str))


def _flatten(state: State) -> tuple[list[Any], tuple[Any, ...]]:
    """The fields that can hold tensors; their names and the other fields, as the structure of a pytree."""
    values = [(f.name, getattr(state, f.name)) for f in dataclasses.fields(state)]
    inner = [(name, value) for name, value in values if not _is_plain(value)]
    plain = tuple((name, value) for name, value in values if _is_plain(value))
    return [value for _, value in inner], (tuple(name for name, _ in inner), plain)


def _flatten_with_keys(state: State) -> tuple[list[tuple[Any, Any]], tuple[Any, ...]]:
    """The same with the name of every field, as `torch.export` wants it."""
    values, context = _flatten(state)
    return list(zip(map(GetAttrKey, context[0]), values, strict=True)), context


def _load_context(saved: Any) -> Any:
    """The structure of a pytree, from JSON, which knows no tuples."""
    return tuple(map(_load_context, saved)) if isinstance(saved, list) else saved


def _unflatten(kind: type[State], values: Iterable[Any], context: tuple[Any, ...]) -> State:
    names, plain = context
    return kind(**dict(zip(names, values, strict=True)), **dict(plain))


@dataclasses.dataclass(frozen=True)
class State:
    """Base of all states. Subclasses are frozen dataclasses; they register themselves by name and as pytrees.

    As pytrees their tensors are leaves; numbers and names are part of the structure.
    """

    kinds: ClassVar[dict[str, type[State]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        State.kinds[cls.__name__] = cls
        register_pytree_node(
            cls,
            _flatten,
            partial(_unflatten, cls),
            flatten_with_keys_fn=_flatten_with_keys,
            serialized_type_name=f"{cls.__module__}.{cls.__qualname__}",
            to_dumpable_context=list,
            from_dumpable_context=_load_context,
        )
        torch.serialization.add_safe_globals([cls])  # plain fields: reading one back runs none of our code

    def map(self, fn: TensorFn) -> Self:
        """The same state with `fn` applied to every tensor in it."""
        fields = {f.name: _map(getattr(self, f.name), fn) for f in dataclasses.fields(self)}
        return type(self)(**fields)

    def tensors(self) -> list[Tensor]:
        """Every tensor of the state, in field order."""
        found: list[Tensor] = []

        def collect(t: Tensor) -> Tensor:
            found.append(t)
            return t

        self.map(collect)
        return found

    def children(self) -> list[tuple[str, State]]:
        """The states directly inside this one, by where they are, such as `layers.0`."""
        return list(_children(self))

    def named_tensors(self) -> dict[str, Tensor]:
        """Every tensor by where it is, such as `layers.0.mixer.memories.1.w1`."""
        return dict(_named(self, ""))

    def replace(self, new: Mapping[str, Tensor]) -> Self:
        """The same state with some of its `named_tensors` replaced.

        Raises:
            ValueError: an unknown name, or a tensor of another shape.
        """
        mine = self.named_tensors()
        for name, tensor in new.items():
            if name not in mine:
                raise ValueError(f"{type(self).__name__} has no tensor {name!r}")
            if tensor.shape != mine[name].shape:
                shapes = f"{list(mine[name].shape)}, got {list(tensor.shape)}"
                raise ValueError(f"{type(self).__name__} holds {name} of shape {shapes}")
        replaced: Self = _replace(self, new, "")
        return replaced

    def detach(self) -> Self:
        """Cut the gradient: later losses no longer reach earlier writes."""
        return self.map(Tensor.detach)

    def to(self, device: torch.device | str) -> Self:
        """The same state on another device."""
        return self.map(lambda t: t.to(device))

    def rows(self, index: Tensor) -> Self:
        """Select, repeat or reorder rows of the batch: `index [N]` of row numbers (beam search, forks).

        Raises:
            ValueError: `index` is no tensor of at least one integer.
        """
        whole = isinstance(index, Tensor) and index.dtype in (torch.int32, torch.int64)
        if not whole or index.dim() != 1 or not len(index):
            raise ValueError(f"index must be a tensor [N] of row numbers, got {index!r}")
        return self.map(lambda t: t.index_select(0, index.to(t.device)))

    def replace_rows(self, rows: Tensor, other: Self) -> Self:
        """The same state with the tensors of some rows taken from `other`: `rows [B]` bool.

        What is not a tensor stays. Raises ValueError if the two do not have the same tensors.
        """
        mine, theirs = self.named_tensors(), other.named_tensors()
        if mine.keys() != theirs.keys():
            raise ValueError(f"states differ in {sorted(mine.keys() ^ theirs.keys())[0]!r}")

        def pick(name: str, t: Tensor) -> Tensor:
            return torch.where(rows.view(-1, *[1] * (t.dim() - 1)), theirs[name], t)

        return self.replace({name: pick(name, t) for name, t in mine.items()})

    def numel(self) -> int:
        """How many numbers the state holds, over all rows of the batch."""
        return sum(t.numel() for t in self.tensors())

    def save(self, path: str | Path) -> None:
        """Write the state to one file; `load_state` reads it back.

        Raises:
            FileNotFoundError: its folder does not exist.
        """
        if not Path(path).parent.is_dir():
            raise FileNotFoundError(f"no folder {Path(path).parent} to save a state in")
        torch.save({"format": FORMAT, "version": VERSION, "state": _pack(self.detach())}, path)


def load_state(path: str | Path, map_location: torch.device | str = "cpu") -> Any:
    """Read a state written by `State.save`. Only tensors and plain values are read: no code can run.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no state, is cut off, or was written by another version.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"no state file {path}{near_path(Path(path))}")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is no state written by State.save, or is cut off")
    try:
        found = torch.load(path, map_location=map_location, weights_only=True)
    except (RuntimeError, UnpicklingError, EOFError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{path} cannot be read as a state: {reason}") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ValueError(f"{path} is no state written by State.save of version {VERSION}")
    if found["version"] != VERSION:
        raise ValueError(f"{path} is a state of version {found['version']}, read is version {VERSION}")
    try:
        return _unpack(found["state"])
    except ValueError as error:
        raise ValueError(f"{path} {error}") from error


@dataclasses.dataclass(frozen=True)
class LayerState(State):
    """State of one block: of its mixer and of its feed-forward memory (`None` where there is none)."""

    mixer: Any = None
    memory: Any = None


@dataclasses.dataclass(frozen=True)
class ModelState(State):
    """State of a whole model. `position` counts the tokens read since the start of the context.

    `packed`: it read rows of several documents, and cannot be continued.
    """

    layers: tuple[LayerState, ...]
    position: int = 0
    packed: bool = False
