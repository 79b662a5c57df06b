import math

import pytest

from nested_learning.optim import constant, cosine, lr_at
from nested_learning.optim.config import OptimConfig


def test_warm_up_reaches_one_at_its_last_step():
    assert [cosine(step, 100, 4) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert [constant(step, 4) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_cosine_known_numbers():
    assert cosine(55, 100, 10, 0.1) == pytest.approx(0.55)  # half way: mean of 1 and 0.1
    assert cosine(40, 100, 10, 0.0) == pytest.approx((1 + math.cos(math.pi / 3)) / 2)  # a third: 0.75
    assert cosine(100, 100, 10, 0.1) == pytest.approx(0.1)
    assert cosine(5000, 100, 10, 0.1) == pytest.approx(0.1)


def test_without_warm_up_the_first_step_is_whole():
    assert cosine(0, 10) == constant(0) == 1.0


def test_lr_at_scales_the_schedule_of_the_configuration():
    config = OptimConfig(lr=0.02, warmup_steps=0, min_lr_ratio=0.5)
    assert [lr_at(config, step, 2) for step in range(3)] == pytest.approx([0.02, 0.015, 0.01])
    config = OptimConfig(lr=0.02, warmup_steps=2, schedule="constant")
    assert [lr_at(config, step, 2) for step in range(3)] == pytest.approx([0.01, 0.02, 0.02])
