"""What the entry points `train*.py` share: a job of Hydra's, alone or in a sweep (`-m`), and its end."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from nested_learning.config import run_config
from nested_learning.train.guard import NonFiniteError
from nested_learning.train.launch import launch

BAD_INPUT, INTERRUPTED = 2, 130


def run_job(config: DictConfig, strategy: str = "single") -> None:
    """Train as the command line says.

    Ends the process with status 2 and one line for settings, files and folders that cannot be used, 1 for
    numbers that are not finite, 130 for an interruption before there was anything to save. A job of a sweep
    raises instead, so that the next one starts; an interrupted one ends the sweep, with 130. With
    `HYDRA_FULL_ERROR=1` all errors are raised.
    """
    sweep = HydraConfig.get().mode == RunMode.MULTIRUN
    if sweep:
        name_by_difference(config, HydraConfig.get().overrides.task, sys.argv[1:])
    try:
        result = launch(run_config(config), strategy)
    except (ValueError, OSError, NonFiniteError) as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        job = f"job {config.name}: " if sweep else ""
        print(f"{Path(sys.argv[0]).name}: {job}{error}", file=sys.stderr, flush=True)
        if sweep:
            raise
        sys.exit(1 if isinstance(error, NonFiniteError) else BAD_INPUT)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from the last checkpoint", file=sys.stderr)
        sys.exit(INTERRUPTED)
    if sweep and result.interrupted:
        print("the jobs that are left of the sweep are not started", file=sys.stderr)
        sys.exit(INTERRUPTED)


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
