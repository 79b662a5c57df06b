"""Fast levels of the Continuum Memory System (Eqs. 70–74)."""
