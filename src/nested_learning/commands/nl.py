"""The `nl` command: finds the module of a command and calls its `main`.

Only the chosen module is imported, so that `nl --help` does not wait for torch. To add a command, write a
module whose `main` reads `sys.argv`, and add a line to a table; its docstring begins with the line of help.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from nested_learning.command import DEBUG, Parser, run_command
from nested_learning.commands import bench, data, evaluation


@dataclass(frozen=True, slots=True)
class Group:
    """Commands that share a first word.

    Args:
        help: one line for the overview.
        commands: name → module.
    """

    help: str
    commands: Mapping[str, str]


COMMANDS: dict[str, str | Group] = {
    "train": "nested_learning.commands.train_here",
    "doctor": "nested_learning.commands.doctor",
    "audit": "nested_learning.commands.audit",
    "plan": "nested_learning.commands.plan",
    "verify-checkpoint": "nested_learning.commands.verify_checkpoint",
    "export": "nested_learning.commands.export",
    "generate": "nested_learning.commands.generate",
    "chat": "nested_learning.commands.chat",
    "report": "nested_learning.commands.report",
    "inspect": "nested_learning.commands.inspect",
    "reproduce": "nested_learning.commands.reproduce",
    "data": Group("Prepare and check training data", data.COMMANDS),
    "eval": Group("Evaluate checkpoints, and compare their results", evaluation.EVALUATIONS),
    "bench": Group("Measure speed and memory", bench.COMMANDS),
}
"""Name after `nl` → its module, or a group of further names."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status of `run_command`."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    return run_command("nl", lambda: dispatch("nl", COMMANDS, words), debug=DEBUG in words)


def dispatch(called: str, table: Mapping[str, str | Group], words: Sequence[str]) -> int | None:
    """Run the command of `table` that the first of `words` names, with the other words.

    Without such a name the parser of the overview prints the help or says what is wrong.

    Args:
        called: what stands before `words` on the command line, for usage lines.
        table: the names that are allowed.

    Raises:
        ValueError: no name, or one that is not in the table.
    """
    named = [word for word in words if word != DEBUG][:1]
    if not named or named[0] not in table:
        overview(called, table).parse_args(words)
        raise ValueError(f"{called} needs the name of a command before {' '.join(words)!r}")
    rest = list(words)
    rest.remove(named[0])
    called, entry = f"{called} {named[0]}", table[named[0]]
    if isinstance(entry, Group):
        return dispatch(called, entry.commands, rest)
    module = importlib.import_module(entry)
    with command_line(called, rest):
        status: int | None = module.main()
    return status


def overview(called: str, table: Mapping[str, str | Group]) -> Parser:
    """A parser that knows the names in a table and a line of help for each, but no options of theirs."""
    parser = Parser(prog=called)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, entry in table.items():
        commands.add_parser(name, help=entry.help if isinstance(entry, Group) else first_sentence(entry))
    return parser


def first_sentence(module: str) -> str:
    """The first sentence of a module's docstring, read without importing the module."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ImportError(f"no module {module}", name=module)
    text = ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split()).split(". ")[0].rstrip(".:")


@contextmanager
def command_line(called: str, arguments: Sequence[str]) -> Iterator[None]:
    """Let `sys.argv` hold the name and the arguments of a command while it runs."""
    before = sys.argv
    sys.argv = [called, *arguments]
    try:
        yield
    finally:
        sys.argv = before


if __name__ == "__main__":
    sys.exit(main())
