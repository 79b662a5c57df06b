"""Unit lower triangular systems."""
