from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from nested_learning.ops.kernels import chosen, use_kernels


@pytest.fixture
def fake_cuda() -> Iterator[None]:
    """All tensors of a test are fake, on whatever device they are made, and gradients are off.

    Fake tensors have a device and no data, so CUDA needs no card: an operation on tensors of two devices
    raises, and so does whatever asks for a value. The backward pass would ask for a CUDA context; see
    `test_stand_in_card.py`. Triton kernels need data, so they stay off.
    """
    before = chosen()
    use_kernels("torch")
    try:
        with FakeTensorMode(allow_non_fake_inputs=False), torch.no_grad():
            yield
    finally:
        use_kernels(before)
