"""Read torch's `.metadata`, a pickle that lists the tensors of a checkpoint, without running code.

torch's own reader unpickles it, and a pickle may call any function. Here the allowed names stand for a few
objects that do nothing, and any other name is an error. What was read is checked, and torch's description
is built from it. (Imported late: torch.distributed.checkpoint is slow to import.)
"""

from __future__ import annotations

import math
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from nested_learning.train.checkpoint.errors import CheckpointError, cause
from nested_learning.train.checkpoint.run_file import METADATA


class MetadataReader(FileSystemReader):
    """torch's reader of a folder of tensors, with metadata that is read without unpickling.

    Raises:
        CheckpointError: see `read_metadata`.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.folder = folder
        self.metadata = read_metadata(folder)
        self.metadata.storage_meta = StorageMeta(load_id=self.load_id)

    def read_metadata(self) -> Metadata:
        """What was read at the start."""
        return self.metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read the tensors of a plan, file by file, so that an error names the file."""
        files: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            files.setdefault(self.storage_data[item.storage_index].relative_path, []).append(item)
        for name, items in files.items():
            try:
                super().read_data(replace(plan, items=items), planner)
            except Exception as error:  # torch raises many kinds
                raise CheckpointError(f"{self.folder / name} cannot be read: {cause(error)}") from error
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @property
    def tensors(self) -> dict[str, TensorStorageMetadata]:
        """Size and type of every tensor by its key."""
        entries: dict[str, Any] = self.metadata.state_dict_metadata
        return entries


def read_metadata(folder: Path) -> Metadata:
    """The tensors in a checkpoint, and in which of its files they are.

    Raises:
        CheckpointError: no such file, a damaged one, one that names what has no place in it, or one that does
            not agree with the files it describes.
    """
    path = folder / METADATA
    try:
        with path.open("rb") as file:
            root = _Unpickler(file).load()
        return _build(root, folder)
    except Exception as error:  # a damaged pickle raises any kind
        raise CheckpointError(f"{path} is no description of tensors: {cause(error)}") from error


class _Record:
    """Stands for an instance of any class of torch's metadata; `state` holds its saved fields."""

    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _nothing(*arguments: Any) -> None:
    """Stands for values in the description that are not needed: paths, layouts, memory formats."""


_CLASSES = (
    *("Metadata", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata", "MetadataIndex"),
    *("StorageMeta", "BytesStorageMetadata"),
)
_PATHS = ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")
_STAND_INS: dict[tuple[str, str], Any] = {
    **{("torch.distributed.checkpoint.metadata", name): _Record for name in _CLASSES},
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): _Record,
    **{("torch", name): value for name, value in vars(torch).items() if isinstance(value, torch.dtype)},
    ("torch", "Size"): tuple,
    ("torch.serialization", "_get_layout"): _nothing,
    ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"): _nothing,
    ("builtins", "getattr"): _nothing,  # how Python 3.11.0 to 3.11.3 pickles members of an Enum
    **{(module, name): _nothing for module in ("pathlib", "pathlib._local") for name in _PATHS},
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """The stand-in for a name. Raises UnpicklingError for a name that is not allowed."""
        if (module, name) not in _STAND_INS:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which has no place in it")
        return _STAND_INS[module, name]


def _build(root: Any, folder: Path) -> Metadata:
    """torch's own description, from what was read; ValueError, TypeError or KeyError if it is not one."""
    fields = _fields(root)
    stored = {}
    for record, place in _of(dict, fields["storage_data"]).items():
        index = _fields(record)
        stored[MetadataIndex(_of(str, index["fqn"]), _size(index["offset"]))] = _place(place, folder)
    tensors: Any = {
        _of(str, key): _tensor(key, _fields(record), stored)
        for key, record in _of(dict, fields["state_dict_metadata"]).items()
    }
    return Metadata(state_dict_metadata=tensors, storage_data=stored, version=_of(str, fields["version"]))


def _tensor(
    key: str, fields: dict[str, Any], stored: dict[MetadataIndex, _StorageInfo]
) -> TensorStorageMetadata:
    """One tensor, all of whose parts are in the files and no larger there than the room they have."""
    dtype = _of(torch.dtype, _of(tuple, _of(_Record, fields["properties"]).state)[0])
    size = _size(fields["size"])
    chunks = []
    for record in _of(list, fields["chunks"]):
        part = _fields(record)
        chunk = ChunkStorageMetadata(_size(part["offsets"]), _size(part["sizes"]))
        needed = math.prod(chunk.sizes) * dtype.itemsize
        place = stored.get(MetadataIndex(key, chunk.offsets))
        if needed and (place is None or place.length < needed):
            raise ValueError(f"{key} has {needed} bytes, for which there is no room in the files")
        chunks.append(chunk)
    if sum(math.prod(chunk.sizes) for chunk in chunks) != math.prod(size):
        raise ValueError(f"the parts of {key} do not make {tuple(size)}")
    return TensorStorageMetadata(TensorProperties(dtype=dtype), size, chunks)


def _place(record: Any, folder: Path) -> _StorageInfo:
    """Where a part of a tensor is: a stretch of a file in `folder` itself."""
    fields = _fields(record)
    name, offset, length = (
        _of(kind, fields[key]) for key, kind in (("relative_path", str), ("offset", int), ("length", int))
    )
    if Path(name).name != name or "\\" in name:
        raise ValueError(f"it names the file {name!r} outside of the checkpoint")
    size = (folder / name).stat().st_size
    if offset < 0 or length < 0 or offset + length > size:
        raise ValueError(f"it says that {name} has at least {offset + length} bytes, it has {size}")
    if fields.get("transform_descriptors"):
        raise ValueError(f"{name} is transformed by {fields['transform_descriptors']}")
    return _StorageInfo(name, offset, length)


def _fields(record: Any) -> dict[str, Any]:
    found: dict[str, Any] = _of(dict, _of(_Record, record).state)
    return found


def _size(value: Any) -> torch.Size:
    if not all(_of(int, n) >= 0 for n in _of(tuple, value)):
        raise ValueError(f"{value} is no size")
    return torch.Size(value)


def _of(kind: type, value: Any) -> Any:
    if type(value) is not kind:
        raise TypeError(f"expected {kind.__name__}, found {type(value).__name__}")
    return value
