"""The weights of a state that can learn: select, initialise, keep and compare them.

A memory is a state. `state.save`, `load_state` and `state.rows` (forks) do the rest.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from nested_learning.adapt.config import AdaptConfig
from nested_learning.checks import one_of
from nested_learning.layers.cms import FastLevelState
from nested_learning.layers.linear import LinearState
from nested_learning.layers.memory import MemoryState
from nested_learning.layers.mlp import SwiGLUState
from nested_learning.layers.self_modifying_linear import SelfModLinearState
from nested_learning.state import State

CHOICES: dict[str, tuple[str, ...]] = {
    "titan": ("titan",),
    "cms_fast": ("cms_fast",),
    "cms": ("cms_fast", "cms_plain"),
    "all": ("titan", "cms_fast", "cms_plain"),
}
PATH_OF_STATE: dict[type[State], str] = {FastLevelState: "cms_fast", SwiGLUState: "cms_plain"}
WEIGHTS: dict[type[State], tuple[str, ...]] = {
    MemoryState: ("w2", "w1"),
    LinearState: ("weights",),
    SelfModLinearState: ("gain",),
    SwiGLUState: ("w_in", "w_out"),
}


class Adaptable(Protocol):
    """A model that can be adapted, such as `HopeLM`.

    One whose states are not made of those of this package also has a method `fast_paths(state)`, with the
    same result as the function of that name. The weights it names must be batch-first and exist in the
    state that `init_state` gives.
    """

    def __call__(self, tokens: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """`tokens [B, T]` → (`logits [B, T, V]`, state)."""
        ...

    def init_state(self, batch: int, plain: bool = False) -> Any:
        """State at the start of a context; with `plain`, ordinary MLPs are weights of it too."""
        ...


def fast_paths(model: Adaptable, state: State) -> dict[str, list[str]]:
    """Weights that can learn, as names of `state.named_tensors()`, by path.

    "titan": memories of the mixers. "cms_fast": fast levels. "cms_plain": ordinary levels, where the state
    holds their weights.
    """
    own = getattr(model, "fast_paths", None)
    if own is not None:
        named: dict[str, list[str]] = own(state)
        return named
    found: dict[str, list[str]] = defaultdict(list)
    _collect(state, "titan", "", found)
    return {path: names for path, names in found.items() if names}


def _collect(state: State, path: str, name: str, found: dict[str, list[str]]) -> None:
    path = PATH_OF_STATE.get(type(state), path)  # a memory inside a fast level is that level's
    for field in WEIGHTS.get(type(state), ()):
        value, own = getattr(state, field), f"{name}.{field}"
        found[path] += [f"{own}.{i}" for i in range(len(value))] if isinstance(value, tuple) else [own]
    for key, child in state.children():
        _collect(child, path, f"{name}.{key}" if name else key, found)


def learning_names(model: Adaptable, state: State, config: AdaptConfig) -> list[str]:
    """Names of the weights that learn as `config` says; none for a learning rate of 0.

    Raises:
        ValueError: the model has no weights of `config.paths`, or the state lacks some that the model has.
    """
    if config.lr == 0:
        return []
    paths, expected = fast_paths(model, state), fast_paths(model, start(model, 1, config))
    chosen = [path for path in CHOICES[config.paths] if path in expected]
    if not chosen:
        raise ValueError(
            f"adapt.paths = {config.paths} selects no weights of this model; "
            f"it has {', '.join(expected) or 'none that can learn'}"
        )
    if lacking := [path for path in chosen if path not in paths]:
        raise ValueError(
            f"adapt.paths = {config.paths} makes {', '.join(lacking)} learn, but the state does not hold "
            "their weights; begin with state=None, or with a state that was adapted along these paths"
        )
    return [name for path in chosen for name in paths[path]]


def start(model: Adaptable, batch: int, config: AdaptConfig) -> Any:
    """The state at the start of a context. It holds all weights that can learn by `config`."""
    return model.init_state(batch, plain="cms_plain" in CHOICES[config.paths] and config.lr > 0)


def restart(model: Adaptable, state: Any, paths: str = "all") -> Any:
    """The start of a new context in which only the weights of `paths` keep what they have learned.

    Raises:
        ValueError: `paths` is not one of "titan", "cms_fast", "cms", "all".
    """
    one_of("paths", paths, CHOICES)
    named = state.named_tensors()
    learned = fast_paths(model, state)
    kept = [name for path in CHOICES[paths] for name in learned.get(path, ())]
    batch = next(iter(named.values())).shape[0] if not kept else named[kept[0]].shape[0]
    fresh = model.init_state(batch, plain="cms_plain" in learned and "cms_plain" in CHOICES[paths])
    return fresh.replace({name: named[name] for name in kept})


@torch.no_grad()
def diff(model: Adaptable, a: State, b: State) -> dict[str, dict[str, Tensor]]:
    """Relative distance of the weights of `b` from those of `a`, ‖b − a‖ / ‖a‖ `[B]`, by path and layer.

    A layer is called by the first two parts of its weights' names, such as "layers.0". A linear memory starts
    empty: the distance from there is infinite.

    Raises:
        ValueError: the two states do not have the same weights.
    """
    paths, others = fast_paths(model, a), fast_paths(model, b)
    if paths != others:
        raise ValueError(f"states with different weights: {sorted(paths)} and {sorted(others)}")
    first, second = a.named_tensors(), b.named_tensors()
    found: dict[str, dict[str, Tensor]] = {}
    for path, names in paths.items():
        layers: dict[str, list[str]] = defaultdict(list)
        for name in names:
            layers[".".join(name.split(".")[:2])].append(name)
        found[path] = {layer: _distance(first, second, names) for layer, names in layers.items()}
    return found


def _distance(a: dict[str, Tensor], b: dict[str, Tensor], names: list[str]) -> Tensor:
    moved = sum((b[name] - a[name]).flatten(1).square().sum(1) for name in names)
    size = sum(a[name].flatten(1).square().sum(1) for name in names)
    return torch.sqrt(torch.as_tensor(moved) / torch.as_tensor(size))


def checksum(model: nn.Module) -> str:
    """SHA-256 of all parameters and buffers, with their names: equal exactly when the model is the same."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
