import runpy
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "simple_example.py"


pytestmark = pytest.mark.usefixtures("one_thread")  # models this small are slower on several


def test_the_example_runs_learns_and_says_what_was_updated(capsys):
    main = runpy.run_path(str(EXAMPLE))["main"]
    losses = main(["--input-size", "32", "--hidden-size", "64", "--lr", "3e-3"])
    printed = capsys.readouterr()
    assert printed.out.splitlines()[-3:] == [
        "level1_fast: 512 updates in 512 steps",
        "level2_medium: 32 updates in 512 steps",
        "level3_slow: 2 updates in 512 steps",
    ]
    assert (printed.out + printed.err).count("updated level1_fast, level2_medium, level3_slow;") == 2
    assert losses[-1] < 0.7 * losses[0]
