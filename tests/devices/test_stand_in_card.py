"""Backward passes, updates and learning at test time away from the CPU; see `stand_in_card.py`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.thorough
def test_backward_passes_make_no_tensor_on_the_cpu() -> None:
    """One process for all cases: each would take seconds to start."""
    folders = [str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders)}
    command = [sys.executable, str(HERE / "stand_in_card.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    found = json.loads(done.stdout.splitlines()[-1])
    assert "same device" in found.pop("forgotten")  # a tensor of the CPU would be found
    assert {name: error for name, error in found.items() if error} == {}
    assert len(found) > 20
