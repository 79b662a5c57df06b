"""examples/continue_on_my_text.sh as a user calls it, with the smallest models."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nested_learning.eval.beside import read_matrices

SCRIPT = Path(__file__).parents[2] / "examples" / "continue_on_my_text.sh"
SMALL = ["train.seq_len=64", "train.batch_size=2", "train.eval_batches=1", "train.sample_tokens=0", "seed=1"]


def call(tmp_path, *arguments):
    """The finished process; `RUN=env` finds the commands of the environment of this Python."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    more = {"PATH": path, "RUN": "env", "OUT": str(tmp_path / "out"), "OMP_NUM_THREADS": "1"}
    own = {**more, "NESTED_LEARNING_CACHE": str(tmp_path / "cache"), "BASE": str(tmp_path / "base.txt")}
    words = ["bash", str(SCRIPT), *arguments]
    return subprocess.run(words, cwd=tmp_path, env={**os.environ, **own}, capture_output=True, text=True)


@pytest.mark.slow
def test_from_a_text_to_the_picture(tmp_path):
    (tmp_path / "base.txt").write_text("".join(f"{i} boats and {i * 7} sails.\n" for i in range(4000)))
    (tmp_path / "my.txt").write_text("".join(f"{i % 9} lambs on {i} green hills.\n" for i in range(4000)))
    done = call(tmp_path, "my.txt", "--quick", *SMALL, "data.tokenizer.vocab_size=300")
    assert done.returncode == 0, done.stderr
    matrices = read_matrices([tmp_path / "out" / f"{name}.json" for name in ("hope", "transformer")])
    for matrix in matrices:
        assert (matrix.checkpoints, matrix.texts) == (("base", "mine"), ("base", "mine"))
        assert matrix.changes()[1] < 0  # it has learned something of the new text
        assert f"{matrix.changes()[0]:+.3f} on base" in done.stdout
    assert (tmp_path / "out" / "forgetting.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("given", [[], ["gone.txt"]])
def test_without_a_file_it_says_what_is_missing_and_trains_nothing(tmp_path, given):
    done = call(tmp_path, *given)
    assert done.returncode == 2 and done.stdout == "" and not (tmp_path / "out").exists()
    assert done.stderr.endswith(f"must be a text file or a folder of them, got '{''.join(given)}'\n")


def test_the_page_has_the_commands_of_the_script():
    """In ten lines at most, with the same settings."""
    page = (SCRIPT.parents[1] / "docs" / "tutorial_own_text.md").read_text(encoding="utf-8")
    block = page.split("```bash\n")[1].split("```")[0]
    assert len(block.splitlines()) <= 10
    script = SCRIPT.read_text(encoding="utf-8")
    settings = ("levels=fast", "levels=mlp", "optim.lr=1e-3", "model.dim=64", "model.num_layers=2")
    for word in (*settings, "model.num_heads=2", "nl eval continual", "nl eval forgetting"):
        assert word in block and word in script
    assert "train.steps=60" in block and "more=60" in script
    assert "train.steps=200" in block and "steps=200" in script
