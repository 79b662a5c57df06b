"""The example of a HOPE block in a module of one's own: it learns, and the lines to copy are few."""

import runpy
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "hope_block_in_my_model.py"


pytestmark = pytest.mark.usefixtures("one_thread")  # models this small are slower on several


def test_new_series_are_forecast_well_once_they_have_been_read(capsys):
    errors = runpy.run_path(str(EXAMPLE))["main"](["--mixer", "linear", "--steps", "60"])
    # the last steps are read one by one: with a state that is lost on the way they are as bad as the first
    assert errors["last 8 steps"] < 0.3 * errors["first 4 steps"]
    assert f"last 8 steps: squared error {errors['last 8 steps']:.3f}" in capsys.readouterr().out


def test_the_model_is_a_dozen_lines():
    source = EXAMPLE.read_text(encoding="utf-8")
    model = source[source.index("class MyModel") : source.index("def series")]
    assert 5 < len([line for line in model.splitlines() if line.strip()]) <= 15
