"""Weights and optimizer state in torch.distributed.checkpoint, by the names of the parameters.

Names do not depend on how the model was wrapped or sharded, so what any strategy wrote on any number of
ranks, any other can read. Keys: `model/<parameter>` and `optimizer/<parameter>/<entry>`.
"""

from __future__ import annotations

import warnings
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nested_learning.train.checkpoint.errors import CheckpointError, cause

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from nested_learning.train.checkpoint.metadata import MetadataReader

WRAPPER = "_checkpoint_wrapped_module."  # of activation checkpointing


def pack(model: nn.Module, optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights and optimizer state as tensors by key, and all else of the optimizer as plain values."""
    moments, values = _pack_optimizer(model, optimizer)
    return {**{f"model/{name}": value for name, value in model.state_dict().items()}, **moments}, values


def write_tensors(
    folder: Path, tensors: dict[str, Tensor], group: ProcessGroup | None = None, background: bool = False
) -> Future[Any] | None:
    """Write tensors to `folder`; every rank of `group` calls this and writes its part.

    Returns:
        With `background`, a future of the writing. The tensors are already copied, so training may continue.

    Raises:
        CheckpointError: a rank cannot write.
    """
    dcp = _dcp()
    writer = dcp.FileSystemWriter(folder)
    if background:
        future = dcp.async_save(tensors, storage_writer=writer, process_group=group)
        assert isinstance(future, Future)
        return future
    try:
        dcp.save(tensors, storage_writer=writer, process_group=group)
    except (Exception, dcp.api.CheckpointException) as error:  # of any rank
        raise CheckpointError(f"cannot write {folder}: {cause(error)}") from error
    return None


def load_tensors(folder: Path, model: nn.Module, optimizer: Optimizer, values: dict[str, Any]) -> None:
    """Load weights and optimizer state in place, each rank its part, however they were sharded when saved.

    Args:
        folder: a checkpoint; all ranks call this.
        values: the plain values of `pack`.

    Raises:
        CheckpointError: other names, shapes or parameter groups, or a damaged checkpoint.
    """
    if "groups" not in values:
        raise CheckpointError(
            f"cannot resume from {folder}: its optimizer state was written by DeepSpeed, and only "
            "DeepSpeed on as many ranks reads it"
        )
    reader = _reader(folder)
    weights = _weights(folder, model, reader.tensors)
    moments = _empty_moments(model, reader.tensors)
    _read(reader, {**weights, **moments}, alone=False)
    try:
        _unpack_optimizer(folder, model, optimizer, moments, values)
    except (KeyError, TypeError, AttributeError) as error:
        reason = f"the optimizer state of checkpoint {folder} is damaged: {cause(error)}"
        raise CheckpointError(reason) from error


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The weights, whole and on the CPU, in this process alone."""
    reader = _reader(folder)
    weights = {key: _empty(entry) for key, entry in reader.tensors.items() if key.startswith("model/")}
    _read(reader, weights, alone=True)
    return {key.removeprefix("model/"): value for key, value in weights.items()}


def nonfinite_weights(folder: Path) -> list[str]:
    """Names of the weights in a checkpoint that are not finite; only one tensor at a time is in memory."""
    reader, found = _reader(folder), []
    for key, entry in reader.tensors.items():
        if key.startswith("model/") and entry.properties.dtype.is_floating_point:
            one = {key: _empty(entry)}
            _read(reader, one, alone=True)
            if not torch.isfinite(one[key]).all():
                found.append(key.removeprefix("model/"))
    return found


def parameter_names(model: nn.Module) -> dict[int, str]:
    """`id` of a parameter → its name as in `state_dict`."""
    return {id(p): name.replace(WRAPPER, "") for name, p in model.named_parameters()}


def _pack_optimizer(model: nn.Module, optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by parameter and entry; all the rest as plain values, parameters by name."""
    packed, names = optimizer.state_dict(), _numbered(model, optimizer)
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Any] = {}
    for number, entries in packed["state"].items():
        for entry, value in entries.items():
            key = f"optimizer/{names[number]}/{entry}"
            (tensors if isinstance(value, Tensor) else plain)[key] = value
    groups = [{**group, "params": [names[i] for i in group["params"]]} for group in packed["param_groups"]]
    return tensors, {"groups": groups, "plain": plain}


def _unpack_optimizer(
    folder: Path, model: nn.Module, optimizer: Optimizer, moments: dict[str, Tensor], values: dict[str, Any]
) -> None:
    names = _numbered(model, optimizer)
    numbers = {name: number for number, name in names.items()}
    present = [[names[i] for i in group["params"]] for group in optimizer.state_dict()["param_groups"]]
    if present != [group["params"] for group in values["groups"]]:
        raise CheckpointError(
            f"the optimizer of checkpoint {folder} has other parameter groups than this one"
        )
    state: dict[int, dict[str, Any]] = {}
    for key, value in {**moments, **values["plain"]}.items():
        _, name, entry = _parts(key)
        state.setdefault(numbers[name], {})[entry] = value
    groups = [{**group, "params": [numbers[name] for name in group["params"]]} for group in values["groups"]]
    try:
        optimizer.load_state_dict({"state": state, "param_groups": groups})
    except ValueError as error:
        raise CheckpointError(f"cannot resume from {folder}: {error}") from error


def _numbered(model: nn.Module, optimizer: Optimizer) -> dict[int, str]:
    """Number of a parameter in the optimizer's `state_dict` → its name."""
    names = parameter_names(model)
    numbers = [i for group in optimizer.state_dict()["param_groups"] for i in group["params"]]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return {i: names[id(p)] for i, p in zip(numbers, parameters, strict=True)}


def _dcp() -> Any:
    """The package torch.distributed.checkpoint, imported late because that is slow.

    It is untyped because it exports nothing explicitly. Its warning about a single process is filtered here,
    because its threads raise it too.
    """
    import torch.distributed.checkpoint as dcp

    warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
    return dcp


def _reader(folder: Path) -> MetadataReader:
    """The reader of a checkpoint folder. Raises CheckpointError if its metadata cannot be read."""
    from nested_learning.train.checkpoint.metadata import MetadataReader

    return MetadataReader(folder)


def _empty(entry: Any) -> Tensor:
    return torch.empty(entry.size, dtype=entry.properties.dtype)


def _parts(key: str) -> list[str]:
    """`optimizer`, parameter and entry of a key."""
    parts = key.split("/")
    if len(parts) != 3:
        raise KeyError(key)
    return parts


def _weights(folder: Path, model: nn.Module, saved: dict[str, Any]) -> dict[str, Tensor]:
    """The model's own tensors by key. Raises CheckpointError if the saved ones do not fit them."""
    wanted = {f"model/{name}": value for name, value in model.state_dict().items()}
    there = {key for key in saved if key.startswith("model/")}
    problems = [f"missing {key[6:]}" for key in wanted.keys() - there]
    problems += [f"unexpected {key[6:]}" for key in there - wanted.keys()]
    for key in wanted.keys() & there:
        if wanted[key].shape != saved[key].size:
            problems.append(f"{key[6:]} is {tuple(saved[key].size)}, not {tuple(wanted[key].shape)}")
    if problems:
        raise CheckpointError(
            f"the weights of checkpoint {folder} do not fit its model: {', '.join(sorted(problems))}"
        )
    return wanted


def _empty_moments(model: nn.Module, saved: dict[str, Any]) -> dict[str, Tensor]:
    """Empty tensors for the saved optimizer state, sharded like the parameter if they have its shape."""
    parameters = {name.replace(WRAPPER, ""): p for name, p in model.named_parameters()}
    moments: dict[str, Tensor] = {}
    for key, entry in saved.items():
        if not key.startswith("optimizer/"):
            continue
        parameter, dtype = parameters.get(key.split("/")[1]), entry.properties.dtype
        if parameter is not None and parameter.shape == entry.size:
            moments[key] = torch.empty_like(parameter, dtype=dtype, requires_grad=False)
        else:
            moments[key] = _empty(entry)
    return moments


def _read(reader: MetadataReader, tensors: dict[str, Tensor], alone: bool) -> None:
    """Fill `tensors`. torch reads each of them with `weights_only`, so no code in the files is run."""
    dcp = _dcp()
    try:
        dcp.load(tensors, storage_reader=reader, no_dist=alone)
    except (Exception, dcp.api.CheckpointException) as error:  # of any rank
        raise CheckpointError(f"cannot read checkpoint {reader.folder}: {cause(error)}") from error
