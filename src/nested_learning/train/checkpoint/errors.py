"""What goes wrong with checkpoints."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be used or written, and why."""
