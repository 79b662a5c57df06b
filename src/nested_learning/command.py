"""How every command ends: a user's mistake with one line and status 2, a fault of ours with its traceback.

`nl`, the scripts in `scripts/` and `train*.py` all run in `run_command`. `--debug`, or `NL_DEBUG=1`, also
shows the traceback of a mistake. Torch and Hydra are imported only where they are needed, so that `--help` is
fast.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml

from nested_learning.checks import did_you_mean

BAD_INPUT, INTERRUPTED = 2, 130
DEBUG = "--debug"
RANK_0_SPEAKS_WITHIN = 10.0  # seconds
OURS = Path(__file__).resolve().parent
LIBRARIES = Path(yaml.__file__).resolve().parents[1]


class Parser(argparse.ArgumentParser):
    """Reads a command line; what is wrong with it is a ValueError of one line, without the usage.

    The description is shown as it stands. `--debug` is an option of every command.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"formatter_class": argparse.RawDescriptionHelpFormatter, **options})
        self.add_argument(
            DEBUG, action="store_true", default=argparse.SUPPRESS, help="show the traceback of every error"
        )

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        """See `argparse`. Arguments and options may stand in any order. Raises ValueError."""
        parse = self.parse_known_args if self._subparsers else self.parse_known_intermixed_args
        options, unknown = parse(args, namespace)
        check_known(unknown, self.names())
        return options

    def names(self) -> set[str]:
        """All options, those of subcommands included."""
        subcommands = [a for a in self._actions if isinstance(a, argparse._SubParsersAction)]
        parsers = [parser for action in subcommands for parser in action.choices.values()]
        return set(self._option_string_actions).union(*(parser.names() for parser in parsers))

    def error(self, message: str) -> NoReturn:
        """What argparse calls for everything else that is wrong."""
        refuse(message)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            known = [str(choice) for choice in action.choices]
            near = did_you_mean(str(value), known)
            raise argparse.ArgumentError(
                action, f"invalid choice: {value!r}{near}; allowed: {', '.join(known)}"
            )


def check_known(unknown: Sequence[str], known: Iterable[str]) -> None:
    """Raise ValueError if a parser has left arguments over, with the nearest of the options that it knows."""
    if unknown:
        name = unknown[0].partition("=")[0]
        others = [other for other in known if other != name]  # of another subcommand
        near = did_you_mean(name, others) if name.startswith("-") else ""
        raise ValueError(f"unknown argument {unknown[0]!r}{near}")


def refuse(message: str) -> NoReturn:
    """What a parser does with an error, instead of printing its usage and exiting."""
    raise ValueError(message)


def run_script(main: Callable[[], int | None]) -> NoReturn:
    """Run the `main` of a script and exit as `run_command` says."""
    sys.exit(run_command(Path(sys.argv[0]).name, main, debug=DEBUG in sys.argv))


def run_command(name: str, action: Callable[[], int | None], debug: bool = False) -> int:
    """The exit status of a command: what `action` returns (0 for None), unless it raises.

    A mistake (see `is_mistake`) is told in one line on stderr and ends with 2, or with the `exit_status` of
    its class; Ctrl-C ends with 130. Other errors are raised.

    Args:
        name: of the command; it begins the line.
        debug: show the traceback of a mistake too, as with `NL_DEBUG=1`.
    """
    try:
        return action() or 0
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from the last saved place", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if not is_mistake(error):
            raise
        if debug or debugging():
            traceback.print_exc()
        tell(f"{name}: {describe(error)}")
        return int(getattr(error, "exit_status", BAD_INPUT))


def debugging() -> bool:
    """Whether the environment asks for tracebacks."""
    return os.environ.get("NL_DEBUG", "0") not in ("", "0")


def is_mistake(error: Exception) -> bool:
    """Whether an error is about what the command was given, not a fault in its code.

    These are: files and folders that cannot be used; what Hydra says of a configuration; a package that is
    not installed; classes with an `exit_status`; and a ValueError of this package. One that a library raised
    below us is none: we have given it something that we should have checked.
    """
    if hasattr(error, "exit_status"):
        return True
    if isinstance(error, OSError | yaml.YAMLError) or is_configuration_error(error):
        return True
    if isinstance(error, ImportError) and (error.name or "").partition(".")[0] == OURS.name:
        return False
    return isinstance(error, ValueError | ImportError) and not _raised_by_library(error)


def is_configuration_error(error: Exception) -> bool:
    """Whether Hydra or OmegaConf raised an error."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    return isinstance(error, HydraException | OmegaConfBaseException)


def _raised_by_library(error: Exception) -> bool:
    frames = traceback.extract_tb(error.__traceback__)
    place = Path(frames[-1].filename).resolve().parents if frames else ()
    return LIBRARIES in place and OURS not in place


def describe(error: Exception) -> str:
    """An error in one line."""
    if is_configuration_error(error):
        from nested_learning.config_errors import one_line

        return one_line(error)
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    lines = [line.strip() for line in str(error).splitlines()]
    return " ".join(line for line in lines if line) or type(error).__name__


def tell(line: str) -> None:
    """Print a line about a mistake on stderr, once for all ranks of a `torchrun`.

    Rank 0 speaks and ends, upon which torchrun ends the others; one that is still there after 10 seconds has
    a mistake of its own, such as a file that its machine lacks. The line also goes where torchrun looks for
    what it reports as root cause.
    """
    rank = int(os.environ.get("RANK", 0))
    if rank:
        time.sleep(RANK_0_SPEAKS_WITHIN)
        line = f"rank {rank}: {line}"
    print(line, file=sys.stderr, flush=True)
    if report := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        details = {"py_callstack": line, "timestamp": int(time.time())}
        Path(report).write_text(json.dumps({"message": {"message": line, "extraInfo": details}}))
