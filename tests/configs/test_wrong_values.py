"""No value of a configuration, however wrong, meets anything but one line that names its field."""

import math
import random
import re
from dataclasses import fields, is_dataclass
from typing import get_args, get_type_hints

import pytest

from nested_learning.config import load_config
from nested_learning.data.config import SourceConfig
from nested_learning.layers.config import MemoryConfig
from nested_learning.levels import LevelSpec
from nested_learning.models.config import HopeConfig
from nested_learning.train.config import RunConfig, run_config

ANY_SIGN = ("alpha_bias", "eta_bias", "slow_weight")  # numbers that may be negative
NO_TEXT = [3, [], {}, True]
NO_NUMBER = ["abc", "", [1], {"a": 1}, True, 1j]


def leaves(kind, where=""):
    """`(dotted name, declared type)` of every field that holds no further fields."""
    for field in fields(kind):
        hint = get_type_hints(kind)[field.name]
        name = f"{where}{field.name}"
        inner = next((part for part in (hint, *get_args(hint)) if is_dataclass(part)), None)
        if is_dataclass(hint):
            yield from leaves(hint, f"{name}.")
        elif inner is None:
            yield name, hint


def wrong_values(name, hint):
    """Values of the wrong type, range or length for a field."""
    kinds = (
        {part for part in get_args(hint) if part is not type(None)}
        if type(None) in get_args(hint)
        else {hint}
    )
    (kind,) = kinds
    below = [] if name.split(".")[-1] in ANY_SIGN else [-1, -(10**30), -1e-9]
    if kind is bool:
        return ["maybe", 2, [], 0.5]
    if kind is int:
        return [*NO_NUMBER, 1.5, math.nan, *(value for value in below if value != -1e-9)]
    if kind is float:
        return [*NO_NUMBER, math.nan, math.inf, -math.inf, *below]
    if kind is str:
        return NO_TEXT
    item, *more = get_args(kind)
    wrong = [3, "abc", {}, [None], [[1]]]
    if more[-1] is not Ellipsis:  # numbers of a fixed count
        right = [0.5] * (1 + len(more))
        wrong += [[], right[:-1], [*right, 0.5], [math.nan, *right[1:]], [*right[1:], 2.0]]
    return wrong if item is not str else [*wrong, [1]]


ALLOWED = [("train.compile", True), ("train.graphs", True)]  # texts, but true and false are words of them
WRONG = [(name, value) for name, hint in leaves(RunConfig) for value in wrong_values(name, hint)]
WRONG = [(name, value) for name, value in WRONG if (name, value) not in ALLOWED]


def put(name, value):
    values = RunConfig().to_dict()
    *path, last = name.split(".")
    inner = values
    for part in path:
        inner = inner[part]
    inner[last] = value
    return values


def refused(error, name):
    """One line, of our own, that names the field."""
    text = str(error.value)
    assert error.type is ValueError, (error.type, text)
    assert "\n" not in text
    assert name.split(".")[-1] in text, text


@pytest.mark.parametrize("name", sorted({name for name, _ in WRONG}))
def test_every_wrong_value_of_a_field_is_refused(name):
    for value in (value for other, value in WRONG if other == name):
        with pytest.raises(Exception) as error:
            run_config(put(name, value))
            pytest.fail(f"{name} = {value!r} was taken")
        refused(error, name)


def as_override(value):
    """How a value is written on Hydra's command line; None if there it would be another value."""
    if isinstance(value, str):
        return value or None
    if isinstance(value, bool | complex):
        return None
    return re.sub(r"'", "", repr(value)).replace("None", "null")


@pytest.mark.thorough
def test_two_hundred_wrong_overrides_of_the_command_line():
    """Hydra and OmegaConf have their own errors, of several lines, about some of them."""
    hints = dict(leaves(RunConfig))
    texts = (bool, str, str | None)  # a number is a text there, and in a list of texts too
    written = [
        (n, as_override(v))
        for n, v in WRONG
        if not (hints[n] in texts and isinstance(v, int)) and not ("[str" in str(hints[n]) and v == [1])
    ]
    for name, text in random.Random(0).sample([(n, t) for n, t in written if t is not None], 200):
        with pytest.raises(Exception) as error:
            load_config("pilot_smoke", [f"{name}={text}"])
            pytest.fail(f"{name}={text} was taken")
        refused(error, name)


@pytest.mark.parametrize(
    "make, named",
    [
        (lambda: HopeConfig(dim="wide"), "model.dim must be a whole number, got 'wide'"),
        (lambda: HopeConfig.from_dict({"dmi": 3}), "unknown key 'model.dmi'; did you mean model.dim?"),
        (lambda: MemoryConfig(eta_max=math.nan), "model.memory.eta_max must be a finite number, got nan"),
        (lambda: LevelSpec(name="a", gain=math.inf), "model.levels.a.gain must be a finite number, got inf"),
        (lambda: LevelSpec(name="a", layers=(0, 1.5)), "model.levels.a.layers[1] must be a whole number"),
        (lambda: SourceConfig(name="a", kind="text", path=3), "source a.path must be a text, got 3"),
        (
            lambda: run_config({"data": {"mixture": {"sources": [{"name": "a"}]}}}),
            "data.mixture.sources[0].kind is missing",
        ),
    ],
)
def test_dataclasses_made_in_python_check_types_too(make, named):
    with pytest.raises(ValueError, match=re.escape(named)):
        make()


def test_whole_numbers_lists_and_dictionaries_are_taken_for_what_they_mean():
    config = run_config({"optim": {"lr": 1, "betas": [0, 0.5]}, "model": {"levels": [{"name": "a"}]}})
    assert config.optim.lr == 1.0 and isinstance(config.optim.lr, float)
    assert config.optim.betas == (0.0, 0.5)
    assert config.model.levels == (LevelSpec(name="a"),)


@pytest.mark.parametrize("name", ["", "..", "a/../../b", "/tmp/x", "a\nb", "x" * 256, "a\0b"])
def test_a_run_stays_below_its_output_folder(name):
    with pytest.raises(ValueError, match=r"^name must be"):
        run_config({"name": name})


@pytest.mark.parametrize("name", ["a", "a/b", "seed=0,optim.lr=0.1", "a..b", "ünï"])
def test_names_of_runs(name):
    assert run_config({"name": name}).run_dir.parts[-1] == name.split("/")[-1]
