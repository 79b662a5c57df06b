"""Optimizers of the outer loop, their parameter groups and their schedules."""

from nested_learning.optim.build import build_optimizer, lr_at
from nested_learning.optim.combined import Combined
from nested_learning.optim.deep_momentum import DeepMomentum
from nested_learning.optim.delta_gd import DeltaGradientDescent, GeneralizedGradientDescent
from nested_learning.optim.delta_momentum import DeltaMomentum
from nested_learning.optim.learned_rates import LearnedRates
from nested_learning.optim.m3 import M3
from nested_learning.optim.multi_frequency import MultiFrequencyOptimizer
from nested_learning.optim.param_groups import group_names, param_groups
from nested_learning.optim.per_level import setup_optimizers
from nested_learning.optim.schedules import constant, cosine

__all__ = [
    "M3",
    "Combined",
    "DeepMomentum",
    "DeltaGradientDescent",
    "DeltaMomentum",
    "GeneralizedGradientDescent",
    "LearnedRates",
    "MultiFrequencyOptimizer",
    "build_optimizer",
    "constant",
    "cosine",
    "group_names",
    "lr_at",
    "param_groups",
    "setup_optimizers",
]
