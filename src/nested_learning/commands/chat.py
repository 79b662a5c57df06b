"""Talk to a checkpoint whose memory lives on.

uv run nl chat outputs/pilot_smoke
uv run nl chat outputs/pilot_smoke --memory book.pt --learn

What you type is read and continued; both stay in the memory. Lines that begin with a slash are commands:

  /remember FILE    read a file; tells its loss while reading, and in a second reading
  /surprise TEXT    the loss of every token of a text; the memory stays as it is
  /diff [FILE]      how far the memory is from a fresh one, or from a saved one
  /forget           a fresh memory
  /save FILE        keep the memory in a file
  /load FILE        take it from there
  /help, /quit
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from nested_learning.checks import did_you_mean
from nested_learning.command import Parser, describe
from nested_learning.commands.sampling import add_sampling_options, sampler_from
from nested_learning.report import markdown_table

if TYPE_CHECKING:
    from nested_learning.chat import Chat

PROMPT = "> "


class Terminal:
    """Runs the lines that somebody types.

    Args:
        chat: the conversation.
        write: prints a piece of text.
        live: whether a line can be written over, as in a terminal.
    """

    def __init__(self, chat: Chat, write: Callable[[str], None], live: bool = False) -> None:
        self.chat, self.write, self.live = chat, write, live
        self.said = ""  # the end of the last answer
        self.commands: dict[str, Callable[[str], None]] = {
            "remember": self.remember,
            "surprise": self.surprise,
            "diff": self.diff,
            "forget": self.forget,
            "save": self.save,
            "load": self.load,
            "help": self.help,
        }

    def run(self, lines: Iterable[str]) -> None:
        """Answer line after line, until `/quit` or the last one. A mistake is told, and the talk goes on."""
        for line in lines:
            if line.strip() in ("/quit", "/exit"):
                return
            try:
                self.answer(line)
            except (OSError, ValueError) as error:
                self.write(f"{describe(error)}\n")
            except KeyboardInterrupt:
                self.write("\n(stopped)\n")

    def answer(self, line: str) -> None:
        """Run a command, or read a text and continue it.

        Raises:
            ValueError: an unknown command, or one without what it needs.
        """
        if not line.startswith("/"):
            if line.strip():
                self.talk(line)
            return
        name, _, rest = line[1:].strip().partition(" ")
        if name not in self.commands:
            known = [f"/{one}" for one in (*self.commands, "quit")]
            near = did_you_mean(f"/{name}", known)
            raise ValueError(f"unknown command /{name}{near}; there are {', '.join(known)}")
        self.commands[name](rest.strip())

    def talk(self, line: str) -> None:
        """Read a text and show its continuation. It begins on a line of its own in the memory, too."""
        before = "\n" if self.said and not self.said.endswith("\n") else ""
        self.said = line
        for piece in self.chat.say(before + line):
            self.said = piece
            self.write(piece)
        self.write("\n")

    def remember(self, name: str) -> None:
        """`/remember FILE`."""
        text = file_named(name, "remember").read_text(encoding="utf-8")
        for now in self.chat.remember(text):
            line = f"read {now.read:,} of {now.tokens:,} tokens, {now.first:.3f} nats per token"
            if now.again is not None:
                change = now.again / now.first - 1
                self.write(f"{line}; in a second reading {now.again:.3f} ({change:+.1%})\n")
            elif self.live:
                self.write(f"{line}\r")

    def surprise(self, text: str) -> None:
        """`/surprise TEXT`."""
        found = self.chat.surprise(text)
        for word, loss in found:
            self.write(f"{loss:7.3f}  {'#' * min(40, round(3 * loss)):40} {word!r}\n")
        self.write(f"{sum(loss for _, loss in found) / len(found):7.3f}  nats per token\n")

    def diff(self, name: str) -> None:
        """`/diff [FILE]`."""
        moved = self.chat.moved(file_named(name, "diff") if name else None)
        rows = [[f"{layer} {kind}", f"{far:.4f}"] for kind, of in moved.items() for layer, far in of.items()]
        if not rows:
            self.write("this model has no memory that is written\n")
            return
        self.write(markdown_table([f"from {name or 'a fresh memory'}", "relative distance"], rows))

    def forget(self, rest: str) -> None:
        """`/forget`."""
        self.chat.forget()
        self.said = ""
        self.write("the memory is fresh\n")

    def save(self, name: str) -> None:
        """`/save FILE`."""
        path = file_named(name, "save")
        self.chat.save(path)
        self.write(f"memory in {path}, {path.stat().st_size / 2**20:.1f} MiB\n")

    def load(self, name: str) -> None:
        """`/load FILE`."""
        self.chat.load(file_named(name, "load"))
        self.said = ""
        self.write(f"memory of {self.chat.state.position:,} tokens\n")

    def help(self, rest: str) -> None:
        """`/help`."""
        assert __doc__ is not None
        self.write(__doc__.split("commands:\n\n")[1])


def file_named(name: str, command: str) -> Path:
    """The file that a command was given. Raises ValueError without one."""
    if not name:
        raise ValueError(f"/{command} needs a file")
    return Path(name).expanduser()


def typed() -> Iterator[str]:
    """Lines from the terminal, with a prompt and a history; or from a pipe, without."""
    if not sys.stdin.isatty():
        yield from (line.rstrip("\n") for line in sys.stdin)
        return
    import readline  # noqa: F401  # `input` then edits lines and remembers them

    while True:
        try:
            yield input(PROMPT)
        except EOFError:
            print()
            return


def main() -> None:
    """Talk until the end."""
    made = Parser(description=__doc__)
    add_sampling_options(made, 60)
    made.add_argument("--memory", type=Path, metavar="FILE", help="begin with a memory that was saved")
    made.add_argument(
        "--learn", action="store_true", help="learn from the loss of what is read, too (docs/adaptation.md)"
    )
    options = made.parse_args()
    from nested_learning.adapt import AdaptConfig
    from nested_learning.chat import Chat
    from nested_learning.eval.loading import load
    from nested_learning.models.sampling import Sampler

    loaded = load(options.checkpoint, device=options.device)
    learn = AdaptConfig() if options.learn else None
    chat = Chat(loaded.model, loaded.tokenizer, Sampler(**sampler_from(options)), options.stop, learn)
    if options.memory is not None:
        chat.load(options.memory)
    print(f"{loaded.config.name}: type a text and it goes on; /help for what else there is")
    Terminal(chat, lambda text: print(text, end="", flush=True), sys.stdout.isatty()).run(typed())
