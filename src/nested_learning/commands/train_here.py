"""Train a model: `train.py` without the clone, with the configurations of the package.

nl train                                          the default, on the bundled text, in outputs/pilot_smoke
nl train --config-name pilot optim.lr=1e-3        another configuration, other values
nl train -m seed=0,1,2                            a sweep
nl train --cfg job                                print the configuration; --hydra-help: Hydra's options
torchrun --nproc-per-node 2 -m nested_learning train --launcher fsdp

With --launcher (single, ddp, fsdp or deepspeed) it is what train.py, train_dist.py, train_fsdp.py and
train_deepspeed.py are. --config-dir adds a folder of configurations of yours.
"""

from __future__ import annotations

import sys

import hydra
from omegaconf import DictConfig

from nested_learning.checks import one_of
from nested_learning.command import Parser
from nested_learning.commands.train import ENTRY, run_job, run_training
from nested_learning.config import register_schema
from nested_learning.home import config_folder

LAUNCHERS = ("single", "ddp", "fsdp", "deepspeed")


def take_launcher(arguments: list[str]) -> str:
    """Remove `--launcher NAME` from a command line; the name, "single" without it.

    Raises:
        ValueError: no name, or one that is not allowed.
    """
    name = "single"
    for place, word in enumerate(list(arguments)):
        option, equals, value = word.partition("=")
        if option == "--launcher":
            if not equals and place + 1 == len(arguments):
                raise ValueError(f"--launcher needs one of {', '.join(LAUNCHERS)}")
            name = value if equals else arguments[place + 1]
            del arguments[place : place + (1 if equals else 2)]
            break
    one_of("--launcher", name, LAUNCHERS)
    return name


def main() -> None:
    """Train as the command line says, and exit."""
    if {"-h", "--help"} & {*sys.argv[1:]}:
        Parser(description=__doc__, usage="nl train [--config-name NAME] [field=value ...]").parse_args(
            ["-h"]
        )
    arguments = sys.argv[1:]
    launcher = take_launcher(arguments)
    sys.argv[1:] = arguments
    register_schema()
    folder = config_folder()

    @hydra.main(version_base="1.3", config_path=str(folder), config_name=ENTRY)
    def job(config: DictConfig) -> None:
        run_job(config, launcher)

    run_training(job, folder)
