"""`from src.scheduler import ChunkedUpdateScheduler`, from the root of a clone."""

from nested_learning.levels import ChunkedUpdateScheduler

__all__ = ["ChunkedUpdateScheduler"]
