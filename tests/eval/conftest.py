"""Evaluations run on one thread; the tiny trained run is in tests/conftest.py."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def on_one_thread(one_thread: None) -> None:
    """See `one_thread`."""
