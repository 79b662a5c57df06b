"""Generated tasks with known answers."""

from nested_learning.data.synthetic.needle import needle_batch, needle_sample
from nested_learning.data.synthetic.parity import parity_batch
from nested_learning.data.synthetic.recall import recall_batch

__all__ = ["needle_batch", "needle_sample", "parity_batch", "recall_batch"]
