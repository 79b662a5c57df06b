"""The mark of a place in a row that holds no token, or of a target that no loss counts."""

IGNORE = -100
