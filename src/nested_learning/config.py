"""Configurations from YAML files and command lines, composed by Hydra.

`load_config` turns a file and overrides into a `RunConfig`; no other code sees a DictConfig.
"""

from __future__ import annotations

from pathlib import Path

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nested_learning.aliases import our_arguments, our_path
from nested_learning.checks import did_you_mean
from nested_learning.config_errors import composing, one_line, plain_values
from nested_learning.data.config import DataConfig
from nested_learning.home import config_folder
from nested_learning.train.config import RunConfig, run_config
from nested_learning.yaml_files import check_yaml, load_yaml

SCHEMA = "run_schema"


def register_schema() -> None:
    """Make the dataclasses known to Hydra as `run_schema`, the first entry of every defaults list."""
    schema = OmegaConf.structured(RunConfig)
    schema.model.vocab_size = "${data.tokenizer.vocab_size}"
    schema.model.seq_len = "${train.seq_len}"
    ConfigStore.instance().store(name=SCHEMA, node=schema)


def load_data_config(path: str | Path, overrides: list[str] | None = None) -> DataConfig:
    """The data section of a run from a file of its own, such as `configs/data/refinedweb_mixture.yaml`.

    Args:
        path: a YAML file with the fields of `DataConfig`.
        overrides: `["mixture.seed=1", ...]`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a key that `DataConfig` does not have, or a value that is not allowed.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no configuration file {path}")
    try:
        given = OmegaConf.merge(load_yaml(path), OmegaConf.from_dotlist(overrides or []))
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise ValueError(f"{path} with {overrides or 'no overrides'}: {one_line(error)}") from error
    return run_config(plain_values(OmegaConf.create({"data": given}))).data


def load_config(path_or_name: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """Compose a configuration as the command line would.

    Args:
        path_or_name: a YAML file, or the name of an entry of `configs/` such as "pilot_smoke".
        overrides: Hydra overrides such as `["optim.lr=1e-3", "experiment=mixer_attention"]`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: an override or a file that cannot be read, an unknown key, or a value that is not allowed.
    """
    root, name = _locate(path_or_name)
    for file in {root / f"{name}.yaml", *root.glob("*/*.yaml")}:
        check_yaml(file)
    register_schema()
    GlobalHydra.instance().clear()
    overrides = our_arguments(overrides or [])
    with initialize_config_dir(config_dir=str(root), version_base="1.3"), composing(overrides):
        composed = compose(config_name=name, overrides=overrides)
    return run_config(plain_values(composed))


def _locate(path_or_name: str | Path) -> tuple[Path, str]:
    """Folder of the configurations, and the name of one relative to it."""
    path = Path(our_path(path_or_name))
    homes = [Path(), Path("configs"), config_folder()]
    for home in homes:
        file = (home / path.with_suffix(".yaml")).resolve()
        if file.is_file():
            root = next((p for p in file.parents if p.name == "configs"), file.parent)
            return root, file.relative_to(root).with_suffix("").as_posix()
    near = did_you_mean(path.stem, (file.stem for home in homes[1:] for file in home.glob("*.yaml")))
    raise FileNotFoundError(
        f"no configuration {str(path_or_name)!r}; give a file or a name in configs/{near}"
    )
