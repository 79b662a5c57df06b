"""What the memories of a model do while it reads a text: numbers, and a page that shows them.

inspection = inspect_memories(model, tokens)
inspection["0.memory"].per_token("contribution")
"""

from nested_learning.inspection.inspect import inspect_memories
from nested_learning.inspection.measures import effective_rank
from nested_learning.inspection.trace import Inspection, MemoryTrace

__all__ = ["Inspection", "MemoryTrace", "effective_rank", "inspect_memories"]
