"""The models that the experiments compare, and how they are made comparable."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from nested_learning.layers.mlp import swiglu_width
from nested_learning.levels import LevelSpec
from nested_learning.models.bill import count_parameters, fast_weight_bill
from nested_learning.models.config import HopeConfig
from nested_learning.reproduce.defaults import with_setting

MLP = LevelSpec()
FAST = "fast"
"""Name of the fast level that `with_levels` contenders have before their MLP."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Contender:
    """A model to compare: a mixer, what differs from its defaults, and whether it has the levels of the base.

    Args:
        label: as tables show it.
        mixer: name in `MIXERS`.
        model, memory: fields of `HopeConfig` and of its `memory` that differ from the base.
        with_levels: whether the levels of the base stay (a Continuum Memory System); else one plain MLP.
    """

    label: str
    mixer: str
    model: Mapping[str, Any] = field(default_factory=dict)
    memory: Mapping[str, Any] = field(default_factory=dict)
    with_levels: bool = False

    def build(self, base: HopeConfig) -> HopeConfig:
        """`base` with this mixer; its sizes, chunk and levels stay."""
        levels = base.levels if self.with_levels else (MLP,)
        variant = base.cms_variant if self.with_levels else "sequential"
        changed = replace(base, levels=levels, cms_variant=variant, cms_per_head=False)
        chosen = changed.with_mixer(self.mixer, **self.model)
        return replace(chosen, memory=replace(chosen.memory, **self.memory))


CONTENDERS: dict[str, Contender] = {
    "hope": Contender(label="HOPE", mixer="self_mod", with_levels=True),
    "hope_linear": Contender(
        label="HOPE, linear memories",
        mixer="self_mod_linear",
        memory={"retention_target": "init"},  # what is forgotten of a gain comes back in no other way
        with_levels=True,
    ),
    "hope_plain": Contender(
        label="HOPE, nothing adaptive", mixer="self_mod", memory={"adaptive": ()}, with_levels=True
    ),
    "hope_attention": Contender(label="HOPE-Attention", mixer="attention", with_levels=True),
    "self_mod": Contender(label="self-modifying Titans", mixer="self_mod"),
    "titans": Contender(label="Titans", mixer="titans"),
    "gated_delta": Contender(label="gated delta rule", mixer="linear"),
    "gated_delta_2": Contender(label="gated delta rule, η ≤ 2", mixer="linear", memory={"eta_max": 2.0}),
    "sliding_attention": Contender(label="sliding attention", mixer="sliding_attention"),
    "transformer": Contender(label="Transformer", mixer="attention"),
    "transformer_conv": Contender(
        label="Transformer, gate and convolution",
        mixer="attention",
        model={"output_gate": True, "conv_window": 4},
    ),
}


def build_row(row: str, base: HopeConfig) -> HopeConfig:
    """The model of "name" or "name key=value …", made of `base`.

    Raises ValueError for a name, key or value that does not exist.
    """
    name, *changes = row.split()
    if name not in CONTENDERS:
        raise ValueError(f"models must be of {', '.join(CONTENDERS)}, got {name!r}")
    model = CONTENDERS[name].build(base)
    return with_setting(model, " ".join(changes)) if changes else model


def row_label(row: str) -> str:
    """What a table calls "name" or "name key=value …"."""
    name, *changes = row.split()
    return " ".join([CONTENDERS[name].label, *changes])


def same_size(model: HopeConfig, parameters: int) -> HopeConfig:
    """`model` with its last plain MLP as wide as needed for the nearest number of `parameters`.

    Raises:
        ValueError: no plain level, or no width of at least 8 that comes near.
    """
    plain = [i for i, level in enumerate(model.levels) if model.level_kind(level) == "plain"]
    if not plain:
        raise ValueError("model.levels must hold a plain level, whose width can be changed")
    last = plain[-1]

    def of(hidden: int) -> HopeConfig:
        level = replace(model.levels[last], expansion=hidden / model.dim)
        return replace(model, levels=(*model.levels[:last], level, *model.levels[last + 1 :]))

    low, high = count_parameters(of(8)), count_parameters(of(16))
    hidden = 8 * round(1 + (parameters - low) / (high - low))
    if hidden < 8:
        raise ValueError(f"{parameters:,} parameters are too few: without an MLP the model has {low:,}")
    assert swiglu_width(model.dim, hidden / model.dim) == hidden
    return of(hidden)


def state_size(model: HopeConfig, tokens: int) -> int:
    """Numbers in the state of one sequence after `tokens` tokens: fast weights, or keys and values."""
    fixed = sum(bill.total for bill in fast_weight_bill(model))
    seen = {"attention": tokens, "sliding_attention": min(tokens, model.window - 1)}.get(model.mixer, 0)
    return fixed + 2 * model.dim * seen * model.num_layers
