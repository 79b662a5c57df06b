"""Self-modifying Titans (Eqs. 86–90) over whole chunks."""
