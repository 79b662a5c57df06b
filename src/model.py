"""`from src.model import NestedModel`, from the root of a clone."""

from nested_learning.models.nested_mlp import NestedModel

__all__ = ["NestedModel"]
