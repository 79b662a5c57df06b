"""Random layers, lengths and splits against the token loops in float64: outputs, final state, every gradient.

Every draw is made from its own number, so a failing one can be run alone: `pytest "…[draw-17]"`. Its
configuration is printed.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import chain, combinations, product
from typing import Any, NamedTuple

import pytest
import torch
from oracle import assert_equals_loop, liven
from torch import nn

from nested_learning.layers.cms import CMS
from nested_learning.layers.config import ACTIVATIONS, ADAPTIVE, READS, Around, MemoryConfig
from nested_learning.layers.linear import GatedDeltaRule
from nested_learning.layers.self_modifying import SelfModifyingTitans, TitansMemory
from nested_learning.layers.self_modifying_linear import SelfModifyingLinear
from nested_learning.levels import KEYS, TARGETS, VARIANTS, LevelSpec

DRAWS = 200
KINDS = (SelfModifyingTitans, SelfModifyingLinear, TitansMemory, GatedDeltaRule, CMS)
SUBSETS = list(chain.from_iterable(combinations(ADAPTIVE, size) for size in range(len(ADAPTIVE) + 1)))


class Draw(NamedTuple):
    """A layer that can be printed and made, and the shape of its input."""

    make: Callable[..., nn.Module]
    options: dict[str, Any]
    batch: int
    tokens: int
    width: int
    cuts: list[int]


def draw_memory(rng: random.Random, chunk: int, adaptive: tuple[str, ...]) -> MemoryConfig:
    """Any options of a memory with chunks of so many tokens."""
    divisors = [size for size in range(1, chunk + 1) if chunk % size == 0]
    return MemoryConfig(
        delta=rng.random() < 0.7,
        momentum=rng.random() < 0.5,
        retention=rng.random() < 0.7,
        retention_target=rng.choice(("zero", "init")),
        eta_max=rng.choice((None, 0.3, 1.0, 2.0)),
        step_control=rng.choice(("clamp", "clamp", "none")),
        projection_eta_max=rng.choice((None, 0.2, 1.0)),
        adaptive=adaptive,
        self_targets=rng.random() < 0.6,
        stop_gradient_targets=rng.random() < 0.3,
        projection_chunk_size=rng.choice((None, None, *divisors, 2 * chunk, 3 * chunk)),
        hidden=rng.choice((None, 1, 2, 3, 5)),
        eta_bias=rng.choice((None, 0.0, -1.0)),
        alpha_bias=rng.choice((0.0, 1.0, 8.0)),
        keep_every=rng.choice((None, None, 1, 2, 3)),
    )


def draw_around(rng: random.Random) -> Around:
    """Any surroundings of a memory."""
    return Around(
        output_gate=rng.random() < 0.5,
        conv_window=rng.randint(1, 5),
        activation=rng.choice(ACTIVATIONS),
    )


def draw_levels(rng: random.Random, chunk: int) -> list[LevelSpec]:
    """One to three levels, at least one of them fast; their chunks divide one another."""
    levels = []
    for number in range(rng.randint(1, 3)):
        plain = number > 0 and rng.random() < 0.3
        fast = {
            "chunk_size": chunk,
            "eta": rng.choice((None, None, 0.3)),
            "key": rng.choice(KEYS),
            "target": rng.choice(TARGETS),
            "gain": rng.choice((None, 0.1, 1.0)),
            **{name: rng.choice((None, None, True, False)) for name in ("retention", "delta", "momentum")},
        }
        options = {} if plain else fast
        levels.append(LevelSpec(name=str(number), expansion=rng.choice((None, 0.6, 1.0)), **options))
        chunk *= 1 if plain else rng.randint(2, 3)
    rng.shuffle(levels)
    return levels


def draw(number: int) -> Draw:
    """The layer and input with a number. Kinds and adaptive projections take turns; all else is random."""
    rng = random.Random(number)
    turn, subset = divmod(number, len(SUBSETS))
    kind = KINDS[(3 * turn + subset) % len(KINDS)]
    chunk, tokens = rng.choice((1, 2, 3, 4, 5, 7, 8, 16)), rng.randint(1, 18)
    heads = rng.choice((1, 2, 3))
    width = heads * rng.randint(1, 4)
    memory = draw_memory(rng, chunk, SUBSETS[subset])
    memory.error_limit = 0.5 if number % 3 == 0 else None
    growing = memory.momentum or not memory.retention or memory.to_initial
    memory.injection_cap = kind is SelfModifyingLinear and number % 2 == 0 and not growing
    options: dict[str, Any] = {"dim": width}
    if kind is CMS:
        options |= {"levels": draw_levels(rng, chunk), "variant": rng.choice(VARIANTS), "memory": memory}
        options["heads"] = heads if options["variant"] == "independent" else 1
    else:
        options |= {"num_heads": heads, "chunk_size": chunk, "config": memory, "around": draw_around(rng)}
        options |= {} if kind is GatedDeltaRule else {"read": rng.choice(READS)}
    cuts = sorted(rng.sample(range(1, tokens), min(rng.randint(1, 4), tokens - 1)))
    return Draw(kind, options, rng.randint(1, 2), tokens, width, cuts)


def show(found: Draw) -> str:
    options = ", ".join(f"{name}={value!r}" for name, value in found.options.items())
    return f"{found.make.__name__}({options}) on [{found.batch}, {found.tokens}], cut at {found.cuts}"


@pytest.mark.parametrize("number", range(DRAWS), ids="draw-{}".format)
def test_a_random_layer_equals_its_token_loop_in_any_split(number: int) -> None:
    found = draw(number)
    print(show(found))
    torch.manual_seed(number)
    layer = found.make(**found.options).double()
    liven(layer)
    x = torch.randn(found.batch, found.tokens, found.width, dtype=torch.float64)
    length = found.tokens * max(found.width, 8)
    if found.options.get("num_heads") == found.width:
        length *= 1000  # a head of width 1: keys are ±1 but for the 1e-6 under the root, and gradients cancel
    assert_equals_loop(layer, x, found.cuts, length=length)


def test_the_draws_hold_every_layer_read_variant_and_set_of_adaptive_projections() -> None:
    draws = [draw(number) for number in range(DRAWS)]
    of_kind = {kind: [d.options for d in draws if d.make is kind] for kind in KINDS}
    assert all(of_kind.values())
    assert {options["config"].adaptive for options in of_kind[SelfModifyingTitans]} == set(SUBSETS)
    assert {options["read"] for options in of_kind[SelfModifyingTitans]} == set(READS)
    assert {options["variant"] for options in of_kind[CMS]} == set(VARIANTS)
    levels = [spec for options in of_kind[CMS] for spec in options["levels"]]
    assert {(spec.key, spec.target) for spec in levels} == set(product(KEYS, TARGETS))
