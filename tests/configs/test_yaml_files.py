"""YAML that a few lines of aliases blow up is refused before it is built."""

import pytest

from nested_learning.config import load_config, load_data_config
from nested_learning.yaml_files import MOST_VALUES, check_yaml, load_yaml

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9)
)


def test_a_bomb_is_refused_wherever_yaml_is_read(tmp_path):
    bomb = tmp_path / "bomb.yaml"
    bomb.write_text(BOMB)
    readers = (load_yaml, load_data_config, load_config)
    for read in readers:
        with pytest.raises(ValueError, match=r"bomb.yaml holds [\d,]+ values, aliases replaced"):
            read(bomb)
    (tmp_path / "configs" / "data").mkdir(parents=True)
    bomb.rename(tmp_path / "configs" / "data" / "bomb.yaml")
    (tmp_path / "configs" / "mine.yaml").write_text("defaults: [run_schema, data: bomb, _self_]\n")
    with pytest.raises(ValueError, match="bomb.yaml holds"):
        load_config(tmp_path / "configs" / "mine.yaml")


def test_the_count_is_that_of_a_loop(tmp_path):
    """9^9 + ... values: counted without making them."""
    (tmp_path / "bomb.yaml").write_text(BOMB)
    lists = [10]  # a list and nine texts
    for _ in range(1, 9):
        lists.append(1 + 9 * lists[-1])
    with pytest.raises(ValueError, match=f"{1 + 9 + sum(lists):,} values"):
        check_yaml(tmp_path / "bomb.yaml")


@pytest.mark.parametrize(
    "text, named",
    [
        ("a: &a [*a]", "an alias holds itself"),
        ("[" * 100_000, "nested too deeply"),
        ("a: [1", "is not a YAML file"),
        ("&a b: *c", "is not a YAML file"),
        (b"a: \xff\xfe&", "is not a YAML file"),
    ],
)
def test_what_is_no_yaml(tmp_path, text, named):
    file = tmp_path / "x.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=named) as error:
        load_yaml(file)
    assert "\n" not in str(error.value) and "x.yaml" in str(error.value)


def test_aliases_of_the_usual_kind_are_read(tmp_path):
    (tmp_path / "x.yaml").write_text("a: &a {b: 1}\nc: *a\nd: [*a, *a]\n")
    assert load_yaml(tmp_path / "x.yaml") == {"a": {"b": 1}, "c": {"b": 1}, "d": [{"b": 1}, {"b": 1}]}
    many = tmp_path / "many.yaml"
    many.write_text("a: [" + "1, " * (MOST_VALUES + 1) + "]")
    with pytest.raises(ValueError, match="at most 100,000 are read"):
        load_yaml(many)
