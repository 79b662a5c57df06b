"""Generated tasks with known answers."""

from nested_learning.data.synthetic.parity import parity_batch
from nested_learning.data.synthetic.recall import recall_batch

__all__ = ["parity_batch", "recall_batch"]
