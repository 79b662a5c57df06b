"""What the entry points `train*.py` share: a job of Hydra's, alone or in a sweep (`-m`), and its end."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from inspect import getfile, unwrap
from pathlib import Path
from typing import NoReturn

from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from nested_learning.aliases import our_arguments
from nested_learning.checks import did_you_mean
from nested_learning.command import DEBUG, INTERRUPTED, check_known, refuse, run_command, run_script
from nested_learning.config_errors import composing, plain_values
from nested_learning.train.config import RunConfig, run_config
from nested_learning.train.launch import launch
from nested_learning.train.origin import find_origin
from nested_learning.yaml_files import check_yaml

ENTRY = "pilot_smoke"  # what `train*.py` train if they are not told


class JobFailed(Exception):
    """A job of a sweep ended with `status`, and has said why."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


def run_training(main: Callable[[], None], configs: Path | None = None) -> NoReturn:
    """Run the `main` that Hydra has made of a task, and exit as `run_command` says.

    Hydra raises its errors instead of printing them, so that they are told like all others. The status of a
    sweep is that of its first job that failed. `HYDRA_FULL_ERROR=1` means the same as `--debug`.

    Args:
        configs: the folder of the configurations; None = `configs` beside the script of `main`.
    """
    folder = configs or Path(getfile(unwrap(main))).resolve().parent / "configs"

    def compose_and_run() -> int:
        sys.argv[1:] = our_arguments(sys.argv[1:])
        overrides = check_command_line(sys.argv[1:], folder)
        # Hydra wants the overrides in a row; a person may put options between them.
        sys.argv[1:] = [*(word for word in sys.argv[1:] if word not in overrides), *overrides]
        try:
            with composing(overrides):
                main()
        except JobFailed as failure:
            return failure.status
        return 0

    debug = DEBUG in sys.argv or os.environ.get("HYDRA_FULL_ERROR") == "1"
    sys.argv = [argument for argument in sys.argv if argument != DEBUG]
    with environment(HYDRA_FULL_ERROR="1", **({"NL_DEBUG": "1"} if debug else {})):
        run_script(compose_and_run)


def check_command_line(arguments: Sequence[str], configs: Path) -> list[str]:
    """The overrides on a command line that Hydra will read.

    Args:
        arguments: the command line, without the name of the script.
        configs: the folder of the configurations.

    Raises:
        ValueError: an option that Hydra does not have, `--config-name` of no configuration, a YAML file that
            is none or too large, or a sweep with a job that cannot be composed.
    """
    parser = get_args_parser()
    parser.error = refuse  # type: ignore[method-assign]
    options, unknown = parser.parse_known_intermixed_args(arguments)
    check_known(unknown, [*parser._option_string_actions, DEBUG])
    folders = [configs.parent / options.config_path if options.config_path else configs]
    if options.config_dir is not None:
        folders.insert(0, Path(options.config_dir).resolve())
        if not folders[0].is_dir():
            raise ValueError(f"--config-dir must be a folder, got {options.config_dir!r}")
    for folder in folders:
        for file in (*folder.glob("*.yaml"), *folder.glob("*/*.yaml")):
            check_yaml(file)
    name = options.config_name or ENTRY
    if not any((folder / f"{name.removesuffix('.yaml')}.yaml").is_file() for folder in folders):
        known = {file.stem for folder in folders for file in folder.glob("*.yaml")} - {"base"}
        near = did_you_mean(name, known)
        raise ValueError(f"there is no configuration {name!r}{near}; there are {', '.join(sorted(known))}")
    if options.multirun:
        compose_jobs(name, folders, options.overrides)
    return list(options.overrides)


def compose_jobs(name: str, folders: Sequence[Path], overrides: Sequence[str]) -> None:
    """Compose every job of a sweep; ValueError for one that cannot be, before Hydra writes anything."""
    *before, home = folders
    overrides = [*overrides, *(f"hydra.searchpath=[{folder.as_uri()}]" for folder in before)]
    with composing(overrides), initialize_config_dir(str(home), version_base="1.3"):
        parsed = OverridesParser.create().parse_overrides(overrides)
        for job in BasicSweeper.split_arguments(parsed, max_batch_size=None)[0]:
            compose(name, job)


@contextmanager
def environment(**values: str) -> Iterator[None]:
    """Environment variables, set inside."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def run_job(config: DictConfig, strategy: str = "single") -> None:
    """Train as the command line says, and exit with the status of `run_command` unless that is 0.

    A job of a sweep that fails raises `JobFailed` instead, so that the next one starts; an interrupted one
    ends the sweep, with 130.
    """
    sweep = HydraConfig.get().mode == RunMode.MULTIRUN
    if sweep:
        name_by_difference(config, HydraConfig.get().overrides.task, sys.argv[1:])
    status = _train(config, strategy, sweep)
    if sweep and status not in (0, INTERRUPTED):
        raise JobFailed(status)
    if status:
        sys.exit(status)


def _train(config: DictConfig, strategy: str, sweep: bool) -> int:
    def job() -> int:
        result = launch(read_config(config, HydraConfig.get().overrides.task), strategy)
        if sweep and result.interrupted:
            print("the jobs that are left of the sweep are not started", file=sys.stderr)
            return INTERRUPTED
        return 0

    name = Path(sys.argv[0]).name
    try:
        return run_command(f"{name}: job {config.name}" if sweep else name, job)
    except Exception:  # a fault of ours: printed here, for Hydra would cut the traceback
        traceback.print_exc()
        return 1


def read_config(config: DictConfig, overrides: Sequence[str]) -> RunConfig:
    """The run that `config` describes, with the model and tokenizer of `train.init_from` if it names one.

    Args:
        config: as Hydra composed it.
        overrides: of the command line; those that contradict the checkpoint are refused.

    Raises:
        CheckpointError: `train.init_from` cannot be used.
        ValueError: a value that is not allowed.
    """
    values = plain_values(config)
    origin = find_origin(values)
    return run_config(values if origin is None else origin.adopt(values, overrides))


def name_by_difference(config: DictConfig, job: Sequence[str], command_line: Sequence[str]) -> None:
    """Give a job of a sweep a run directory of its own: `name/seed=0`, by what differs between the jobs.

    A name that the sweep itself varies, or makes of other values, counts as it is.

    Args:
        config: of the job; its `name` is changed.
        job: the overrides of the job.
        command_line: of the whole sweep.
    """
    parser = OverridesParser.create()
    given = [parser.parse_override(text) for text in command_line if "=" in text and text[0] != "-"]
    same = {override.key_or_group for override in given if not override.is_sweep_override()}
    differing = [o for o in map(parser.parse_override, job) if o.key_or_group not in {*same, "name"}]
    if not differing or OmegaConf.is_interpolation(config, "name"):
        return
    parts = [f"{override.key_or_group}={override.get_value_element_as_str()}" for override in differing]
    with open_dict(config):
        config.name = f"{config.name}/{','.join(parts).replace('/', '%2F')}"
