"""Delta gradient descent on one linear memory (Eqs. 57, 88)."""
