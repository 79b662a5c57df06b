"""An error about a name or a path says which one is near."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nested_learning.commands.evaluation.zeroshot import check_tasks
from nested_learning.data.tokenizer import load_tokenizer
from nested_learning.eval.loading import load
from nested_learning.state import load_state
from nested_learning.train.checkpoint import find_checkpoint


@pytest.mark.parametrize(
    ("look", "name"),
    [
        (find_checkpoint, "pilot_smoke"),
        (lambda path: load(path), "pilot_smoke"),
        (load_state, "book.pt"),
        (load_tokenizer, "words.model"),
    ],
)
def test_a_path_that_is_not_there(look: Callable[[Path], Any], name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    wrong = tmp_path / name.replace("o", "oo", 1)
    with pytest.raises((ValueError, OSError, RuntimeError), match=rf"did you mean {name}\?"):
        look(wrong)
    with pytest.raises((ValueError, OSError, RuntimeError)) as error:
        look(tmp_path / "zzz" / "xyz")
    assert "did you mean" not in str(error.value)


def test_a_task_that_nobody_knows() -> None:
    with pytest.raises(ValueError, match="there is no task 'piqaa'; did you mean piqa"):
        check_tasks(["boolq", "piqaa"])
    check_tasks(["lambada_openai", "wikitext"])
