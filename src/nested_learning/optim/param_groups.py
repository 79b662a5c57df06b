"""Which parameters belong together: every parameter is claimed by exactly one group."""

from __future__ import annotations

from typing import Any

from torch import nn

MEMORY_MARK = ".initial_"
HEADS = ("head", "lm_head", "classifier")


def group_names(model: nn.Module) -> dict[str, list[str]]:
    """Names of the trainable parameters by kind, in model order.

    * `memory`: initial states of memories (names with `.initial_`). Decay would pull what a context
      starts from towards zero, which is the memory's own retention gate to decide.
    * `embedding`: tables of `nn.Embedding` (a tied output head is the same tensor).
    * `vector`: norms, biases, scalars and depthwise filters: no matrix product, so no scale to shrink.
    * `head`: weights of layers called `head`, `lm_head` or `classifier` that are no such table.
    * `matrix`: all the rest. Matrices and heads decay; rules for matrices get the matrices only.
    """
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    convolutions = [m for m in model.modules() if "conv" in type(m).__name__.lower()]
    filters = {id(p) for module in convolutions for p in module.parameters()}
    kinds: dict[str, list[str]] = {"matrix": [], "head": [], "vector": [], "embedding": [], "memory": []}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if MEMORY_MARK in f".{name}":
            kinds["memory"].append(name)
        elif id(parameter) in tables:
            kinds["embedding"].append(name)
        elif parameter.ndim < 2 or id(parameter) in filters:
            kinds["vector"].append(name)
        elif any(part in HEADS for part in name.split(".")[:-1]):
            kinds["head"].append(name)
        else:
            kinds["matrix"].append(name)
    return kinds


def param_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups for a PyTorch optimizer: `{"name", "params", "weight_decay"}`, none of them empty.

    Raises:
        ValueError: the model has no trainable parameter.
    """
    parameters = dict(model.named_parameters())
    groups: list[dict[str, Any]] = [
        {
            "name": kind,
            "params": [parameters[name] for name in names],
            "weight_decay": weight_decay if kind in ("matrix", "head") else 0.0,
        }
        for kind, names in group_names(model).items()
        if names
    ]
    if not groups:
        raise ValueError("the model has no trainable parameter")
    return groups
