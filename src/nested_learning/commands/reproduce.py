"""Run an experiment of the documentation and print its table.

uv run nl reproduce recall --quick
"""

from __future__ import annotations

import argparse
import sys

from nested_learning.command import INTERRUPTED, Parser
from nested_learning.reproduce import EXPERIMENTS


def main() -> int:
    """Run the chosen experiment and return 130 if it was interrupted."""
    options = parser().parse_args()
    plan = options.experiment.prepare(options)
    try:
        options.experiment.run(options, plan)
    except KeyboardInterrupt:
        print("\nstopped; the same command resumes with the runs that are not finished", file=sys.stderr)
        return INTERRUPTED
    return 0


def parser() -> Parser:
    """A parser with a subcommand for every experiment, which sets `experiment`."""
    made = Parser(description=__doc__)
    names = made.add_subparsers(dest="name", required=True)
    for experiment in EXPERIMENTS:
        defaults = argparse.ArgumentDefaultsHelpFormatter
        one = names.add_parser(experiment.name, help=experiment.help, formatter_class=defaults)
        experiment.add_to(one)
        one.set_defaults(experiment=experiment)
    return made
