"""Interleaving, ratios and floors, with made-up clocks and rates."""

import pytest

from nested_learning.bench.flops import Work
from nested_learning.bench.machine import Floor, MachineRates, floor_seconds
from nested_learning.bench.timing import Spread, interleave, relative_speed


def test_every_round_runs_every_model_once_and_warm_up_is_not_kept():
    order: list[str] = []
    runs = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    seconds = interleave(runs, 3, "cpu", lambda message: None, warmup=2)
    assert order == ["a", "b"] * 5
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3}


def test_times_belong_to_their_model(monkeypatch: pytest.MonkeyPatch):
    clock = [0.0]
    monkeypatch.setattr("nested_learning.bench.timing.time.perf_counter", lambda: clock[0])

    def lasting(seconds: float):
        return lambda: clock.__setitem__(0, clock[0] + seconds)

    measured = interleave({"a": lasting(1.0), "b": lasting(2.5)}, 2, "cpu", lambda message: None)
    assert measured == {"a": [1.0, 1.0], "b": [2.5, 2.5]}


def test_speed_is_compared_within_rounds():
    # the second round was four times slower for both; a ratio of medians would mix the rounds
    assert relative_speed([1.0, 4.0, 1.5], [2.0, 8.0, 1.0]) == Spread(0.5, 0.5, 1.5)


def test_floors_from_known_rates():
    rates = MachineRates(large=100.0, batched=10.0, copy=1000.0, itemsize=2)
    work = [Work("dense", 500.0, 50.0), Work("memory", 200.0, 25.0, batched=True)]
    assert floor_seconds(work, rates) == Floor(large=7.0, mixed=25.0, copy=0.2)
    assert floor_seconds(work, rates, factor=3) == Floor(large=21.0, mixed=75.0, copy=pytest.approx(0.6))
