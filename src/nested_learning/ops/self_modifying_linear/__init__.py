"""The linear special case of self-modifying Titans: memories M(x) = M x that share one gain."""
