"""Which fields of a configuration a run may change on its way, by `train.resume_with`."""

from __future__ import annotations

from collections.abc import Iterable

from nested_learning.checks import field_names, unknown_key

_ANEW = "; train.init_from=CHECKPOINT starts a new run with its weights"
_STATE = f"the optimizer's state depends on it{_ANEW}"
_PLACE = f"the place in the data depends on it{_ANEW}"
FIXED = {
    "model": "the weights are of that model",
    "data.tokenizer": "the weights are of its tokens",
    "seed": _PLACE,
    **dict.fromkeys(("train.batch_size", "train.seq_len", "data.loader"), _PLACE),
    **dict.fromkeys(("data.files", "data.shards", "data.valid_fraction"), _PLACE),
    **dict.fromkeys(("optim.name", "optim.m3.slow_weight", "optim.m3.second_moment"), _STATE),
    **dict.fromkeys(("optim.m3.adamw", "optim.m3.ns_dtype", "optim.delta_momentum.precondition"), _STATE),
    **dict.fromkeys(("optim.deep_momentum.hidden", "optim.deep_momentum.seed"), _STATE),
}
"""What no run can change on its way, and why not."""


def check_resume_with(names: Iterable[str], kind: type) -> None:
    """Refuse names in `train.resume_with` that are no fields, or fields that no run can change on its way.

    Args:
        names: dotted.
        kind: the dataclass of a run's configuration.

    Raises:
        ValueError: the first such name.
    """
    known = set(field_names(kind))
    for name in names:
        if name not in known:
            raise ValueError(f"train.resume_with: {unknown_key(name, kind)}")
        for fixed, reason in FIXED.items():
            if is_in(name, fixed) or is_in(fixed, name):
                inside = "" if is_in(name, fixed) else f"{fixed} is in it, and "
                raise ValueError(f"train.resume_with must not hold {name}: {inside}{reason}")


def is_in(name: str, section: str) -> bool:
    """Whether a dotted name is a section or in it."""
    return name == section or name.startswith(f"{section}.")
