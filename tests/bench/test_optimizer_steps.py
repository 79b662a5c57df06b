"""Times of optimizer steps: all rows beside the yardstick, and an optimizer from a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from nested_learning.bench.optimizers import VARIANTS, YARDSTICK, StepSettings, markdown, measure
from nested_learning.models.config import HopeConfig

SMALL = HopeConfig(vocab_size=16, dim=16, num_layers=2, num_heads=2, mixer="attention")
OTHER = """
import torch

class Counted(torch.optim.SGD):
    def __init__(self, params, lr, log):
        params = list(params)
        with open(log, "a") as file:
            print(*("x".join(map(str, p.shape)) for p in params), file=file)
        super().__init__(params, lr)
        self.log = log

    def step(self, closure=None):
        with open(self.log, "a") as file:
            print("step", file=file)
        return super().step(closure)
"""


def test_an_optimizer_of_a_file_updates_the_matrices_in_every_round(tmp_path: Path) -> None:
    code, log = tmp_path / "theirs.py", tmp_path / "log"
    code.write_text(OTHER)
    settings = StepSettings(
        model=SMALL, steps=3, repeats=2, other=f"{code}:Counted", other_options={"log": str(log)}
    )
    result = measure(settings, lambda message: None)
    shapes, *steps = log.read_text().splitlines()
    assert len(shapes.split()) == sum(result["matrices"].values()) == 2 * 4
    assert len(steps) % 3 == 0 and len(steps) >= 2 * 3  # and rounds to warm up
    rows = {row["name"]: row for row in result["results"]}
    assert list(rows) == [*VARIANTS, "theirs.py:Counted"]
    assert rows[YARDSTICK]["ratio"] == [1.0, 1.0, 1.0]
    for row in rows.values():
        ratios = sorted(a / b for a, b in zip(row["seconds"], rows[YARDSTICK]["seconds"], strict=True))
        assert [row["ratio"][0], row["ratio"][2]] == pytest.approx([ratios[0], ratios[-1]])
    assert "| theirs.py:Counted " in markdown(result)


@pytest.mark.parametrize(
    ("other", "message"), [("none.py:M3", "other must be file.py:Class"), ("{}:M4", "no 'M4'")]
)
def test_what_is_not_there_is_named(tmp_path: Path, other: str, message: str) -> None:
    (tmp_path / "a.py").write_text("")
    settings = StepSettings(model=SMALL, steps=1, repeats=1, other=other.format(tmp_path / "a.py"))
    with pytest.raises(ValueError, match=message):
        measure(settings, lambda text: None)
