"""The value of a position that holds no token, and of a target that no loss counts."""

IGNORE = -100
