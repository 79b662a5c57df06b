"""Tables, numbers and figures of reports."""

from __future__ import annotations

from pathlib import Path

import pytest

from nested_learning.report import highest, interval, markdown_table, mean, new_figure, show


def test_a_table_is_aligned_and_escaped() -> None:
    table = markdown_table(["name", "x"], [["a|b", "1"], ["long name", "10"]])
    assert table == ("| name      |   x |\n| --------- | --: |\n| a\\|b      |   1 |\n| long name |  10 |\n")
    assert markdown_table(["a"], []) == "| a   |\n| --- |\n"
    with pytest.raises(ValueError, match="a row has 1 cells, the header has 2"):
        markdown_table(["a", "b"], [["1"]])


def test_numbers_that_may_be_missing() -> None:
    assert mean([1.0, None]) is None and mean([1.0, 2.0]) == 1.5
    assert highest([1.0, None, 2.0]) == 2.0 and highest([None]) is None
    assert show(None) == "not finite" and show(0.12345, 3) == "0.123"


def test_interval_of_known_numbers():
    assert interval([1.0, 2.0, 3.0]) == "2.0000 ± 2.4843"  # 4.303 / √3
    assert interval([1.0], ".1f") == "1.0" and interval([1.0, None]) == "not finite"
    assert interval([0.0] * 9 + [1.0] * 9, ".3f") == "0.500 ± 0.257"  # 17 degrees of freedom: 2.110


def test_a_figure_is_drawn_without_a_screen(tmp_path: Path) -> None:
    figure = new_figure(2, 1)
    figure.add_subplot().plot([0, 1])
    figure.savefig(tmp_path / "figure.png", dpi=100)
    content = (tmp_path / "figure.png").read_bytes()
    assert content.startswith(b"\x89PNG") and (200).to_bytes(4, "big") in content[:24]
