"""Two-layer memories, M(x) = P x + W₁ σ̂(W₂ x), written by delta gradient descent (Eqs. 89, 91)."""
