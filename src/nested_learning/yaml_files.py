"""YAML from people: read only once it is known to stay small."""

from __future__ import annotations

from pathlib import Path

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

MOST_VALUES = 100_000


def load_yaml(path: str | Path) -> DictConfig | ListConfig:
    """The content of a YAML file.

    Raises:
        ValueError: see `check_yaml`.
    """
    check_yaml(path)
    try:
        return OmegaConf.load(path)
    except (yaml.YAMLError, OmegaConfBaseException, OSError) as error:
        raise _no_yaml(path, error) from error
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deeply") from error


def check_yaml(path: str | Path) -> None:
    """Refuse a YAML file that would fill the memory: a few lines of aliases can stand for 10^9 values.

    Raises:
        ValueError: no YAML in UTF-8, or more than `MOST_VALUES` values once aliases are replaced by what they
            stand for.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        if "&" not in text and len(text) < MOST_VALUES:
            return  # no alias: as many values as it shows
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        count = _count(root, {}) if root else 0
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise _no_yaml(path, error) from error
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deeply, or an alias holds itself") from error
    if count > MOST_VALUES:
        raise ValueError(f"{path} holds {count:,} values, aliases replaced; at most {MOST_VALUES:,} are read")


def _no_yaml(path: str | Path, error: Exception) -> ValueError:
    return ValueError(f"{path} is not a YAML file: {' '.join(str(error).split())}")


def _count(node: yaml.Node, known: dict[int, int]) -> int:
    """Values below `node`, aliases replaced; a node is counted once and then looked up."""
    if id(node) not in known:
        inside: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            inside = [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            inside = node.value
        known[id(node)] = 1 + sum(_count(part, known) for part in inside)
    return known[id(node)]
