"""A wrapper around an optimizer that treats each level separately and has the interface of the inner one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from torch import Tensor
from torch.optim import Optimizer

from nested_learning.optim.base import restore_precision

Groups = list[dict[str, Any]]


class OptimizerWrapper(Optimizer):
    """Base of wrappers: shares `param_groups` and `state` with the inner optimizer.

    Every group holds parameters of one level only, whose name is `group["level"]` (absent outside of
    levels); groups that hold several are split. What a subclass keeps per parameter are entries called `keys`
    in the common state, which the inner optimizer does not see, so checkpoints need no code for them.

    Args:
        optimizer: any torch optimizer that works parameter by parameter and skips those without a
            gradient, as all of `torch.optim` but LBFGS do.
        levels: name of a level → its parameters.

    Raises:
        ValueError: a parameter of two levels, or one that `optimizer` does not have; or an optimizer made
            of `parts`, whose groups must have been split by `split_by_level` before it was made.
    """

    keys: ClassVar[tuple[str, ...]]

    def __init__(self, optimizer: Optimizer, levels: Mapping[str, Iterable[Tensor]]) -> None:
        levels = {name: list(parameters) for name, parameters in levels.items()}
        own = set(_parameters(optimizer.param_groups))
        for name, parameters in levels.items():
            if not own.issuperset(parameters):
                raise ValueError(f"a parameter of level {name!r} is not one of the optimizer")
        groups = split_by_level(optimizer.param_groups, levels)
        if len(groups) != len(optimizer.param_groups) and hasattr(optimizer, "parts"):
            raise ValueError(
                "use split_by_level on the groups of an optimizer before it is combined of parts"
            )
        optimizer.param_groups[:] = groups
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self.optimizer = optimizer
        self._share()

    def _share(self) -> None:
        self.param_groups, self.state = self.optimizer.param_groups, self.optimizer.state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the inner optimizer, outside of levels."""
        if hasattr(self, "optimizer"):
            self.optimizer.add_param_group(param_group)
        else:  # the inner optimizer's own groups, when this one is made
            super().add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear gradients as the inner optimizer does. What a wrapper has gathered is kept."""
        self.optimizer.zero_grad(set_to_none)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        return bool(getattr(self.optimizer, "_step_supports_amp_scaling", False))

    def groups_of(self, level: str) -> Groups:
        """Parameter groups of a level."""
        return [group for group in self.param_groups if group.get("level") == level]

    def _step_inner(self) -> None:
        """One step of the inner optimizer. Forwards `found_inf` to it."""
        if getattr(self, "grad_scale", None) is not None:
            raise ValueError("gradients must not be scaled: call scaler.unscale_(optimizer) before the step")
        inner: Any = self.optimizer
        found = getattr(self, "found_inf", None)
        if found is not None:
            inner.found_inf = found
        own = {parameter: self._take_own(entries) for parameter, entries in self.state.items()}
        try:
            inner.step()
        finally:
            for parameter, entries in own.items():
                self.state[parameter].update(entries)
            if found is not None:
                del inner.found_inf

    def _take_own(self, entries: dict[str, Any]) -> dict[str, Any]:
        """Take this wrapper's entries out of the state of a parameter."""
        return {name: entries.pop(name) for name in self.keys if name in entries}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a `state_dict` of the same wrappers around the same optimizer.

        Raises:
            ValueError: other parameter groups.
        """
        self.optimizer.load_state_dict(dict(state_dict))
        self._share()
        restore_precision(self, state_dict, self.keys)

    def __getstate__(self) -> dict[str, Any]:
        """All there is, but hooks and what torch has patched: for copies and pickles."""
        own = {name: value for name, value in self.__dict__.items() if not name.startswith("_")}
        return {**own, **super().__getstate__()}


def split_by_level(groups: Groups, levels: Mapping[str, Iterable[Tensor]]) -> Groups:
    """Parameter groups of one level each; a group with several is split, its settings are copied.

    Raises:
        ValueError: a parameter of two levels.
    """
    level_of, made = _level_of(levels), list[dict[str, Any]]()
    for group in groups:
        parts: dict[str | None, list[int]] = {}
        for i, parameter in enumerate(group["params"]):
            parts.setdefault(level_of.get(parameter), []).append(i)
        for level, members in parts.items():
            part = group if len(parts) == 1 else {**group}
            for field in ("params", "param_names"):
                if field in group and len(parts) > 1:
                    part[field] = [group[field][i] for i in members]
            if level is not None:
                part["level"] = level
            made.append(part)
    return made


def _level_of(levels: Mapping[str, Iterable[Tensor]]) -> dict[Tensor, str]:
    level_of: dict[Tensor, str] = {}
    for name, parameters in levels.items():
        for parameter in parameters:
            if level_of.setdefault(parameter, name) != name:
                raise ValueError(f"levels {level_of[parameter]!r} and {name!r} must not share a parameter")
    return level_of


def _parameters(groups: Groups) -> list[Any]:
    return [parameter for group in groups for parameter in group["params"]]
