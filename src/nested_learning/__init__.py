"""Nested Learning in PyTorch: HOPE, the Continuum Memory System, self-modifying Titans, deep optimizers.

A name of this package is imported when it is first used, so that `nl --help` does not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nested_learning.config import load_config
    from nested_learning.layers.cms import CMS
    from nested_learning.layers.config import MemoryConfig
    from nested_learning.layers.self_modifying import SelfModifyingTitans, TitansMemory
    from nested_learning.levels import ChunkedUpdateScheduler, LevelSpec
    from nested_learning.models.block import HopeBlock
    from nested_learning.models.config import HopeConfig
    from nested_learning.models.lm import HopeLM
    from nested_learning.models.nested_mlp import NestedModel
    from nested_learning.models.pretrained import levels_from_pretrained
    from nested_learning.optim.per_level import setup_optimizers
    from nested_learning.runtime import set_seed
    from nested_learning.train.checkpoint import load_checkpoint

__version__ = "0.2.0"

_MODULES = {
    "config": ("load_config",),
    "layers.cms": ("CMS",),
    "layers.config": ("MemoryConfig",),
    "layers.self_modifying": ("SelfModifyingTitans", "TitansMemory"),
    "levels": ("ChunkedUpdateScheduler", "LevelSpec"),
    "models.block": ("HopeBlock",),
    "models.config": ("HopeConfig",),
    "models.lm": ("HopeLM",),
    "models.nested_mlp": ("NestedModel",),
    "models.pretrained": ("levels_from_pretrained",),
    "optim.per_level": ("setup_optimizers",),
    "runtime": ("set_seed",),
    "train.checkpoint": ("load_checkpoint",),
}
_HOME = {name: f"{__name__}.{module}" for module, names in _MODULES.items() for name in names}

__all__ = [
    "CMS",
    "ChunkedUpdateScheduler",
    "HopeBlock",
    "HopeConfig",
    "HopeLM",
    "LevelSpec",
    "MemoryConfig",
    "NestedModel",
    "SelfModifyingTitans",
    "TitansMemory",
    "levels_from_pretrained",
    "load_checkpoint",
    "load_config",
    "set_seed",
    "setup_optimizers",
]


def __getattr__(name: str) -> Any:
    """Import a public name from its module."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
