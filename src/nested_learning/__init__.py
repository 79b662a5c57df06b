"""Nested Learning in PyTorch: HOPE, the Continuum Memory System, self-modifying Titans, deep optimizers."""

from nested_learning.config import load_config
from nested_learning.layers.cms import CMS
from nested_learning.layers.self_modifying import SelfModifyingTitans
from nested_learning.layers.titans import TitansMemory
from nested_learning.levels import ChunkedUpdateScheduler, LevelSpec
from nested_learning.models.block import HopeBlock
from nested_learning.models.config import HopeConfig, MemoryConfig
from nested_learning.models.lm import HopeLM
from nested_learning.models.nested_mlp import NestedModel
from nested_learning.models.pretrained import levels_from_pretrained
from nested_learning.optim.per_level import setup_optimizers
from nested_learning.runtime import set_seed
from nested_learning.train.checkpoint import load_checkpoint

__version__ = "0.1.0"

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
