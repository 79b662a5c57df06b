"""`from src.utils import setup_optimizers, set_seed, load_config`, from the root of a clone."""

from pathlib import Path
from typing import Any

from nested_learning.optim.per_level import setup_optimizers
from nested_learning.runtime import set_seed
from nested_learning.yaml_files import load_yaml

__all__ = ["load_config", "set_seed", "setup_optimizers"]


def load_config(path: str | Path) -> Any:
    """The sections of a file such as `configs/default_config.yaml`, by key or as attributes. Configurations
    of runs are read by `nested_learning.load_config`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no YAML file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no configuration file {path}")
    return load_yaml(path)
