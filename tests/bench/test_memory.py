"""Peak memory: known allocations, and failures that are told."""

import sys

import pytest
import torch

from nested_learning.bench.memory import measure_peak, peak_in_subprocess
from nested_learning.bench.settings import Case, smoke_settings

linux_only = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
MB = 2**20


@linux_only
def test_the_peak_is_what_was_alive_at_once():
    def two_then_one() -> None:
        first, second = torch.ones(24 * MB), torch.ones(16 * MB)  # 96 MB and 64 MB
        del first, second
        torch.ones(8 * MB)

    for _ in range(2):  # memory freed by the first run must not hide the second
        assert measure_peak(two_then_one) == pytest.approx(160 * MB, rel=0.05)


@pytest.mark.thorough
def test_a_failing_process_is_an_error_with_its_reason():
    with pytest.raises(RuntimeError, match=r"model\.mixer must be one of"):
        peak_in_subprocess(smoke_settings(), Case("unknown", "unknown", 8), batch=1, length=8)
