"""Progress bars that are lines where nobody can watch a bar: in log files, pipes and batch jobs."""

from __future__ import annotations

import sys
import time
from typing import Any

from tqdm.auto import tqdm as bar_for_people
from tqdm.std import tqdm

EVERY = 30.0
"""Seconds between two lines."""
LINE = "{desc} {percentage:3.0f}% {n}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
LINE_WITHOUT_END = "{desc} {n} [{elapsed}, {rate_fmt}{postfix}]"


class Lines(tqdm):  # type: ignore[misc]
    """A progress bar that writes a line at the start, one every `EVERY` seconds, and one at the end."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.told = float("-inf")
        options.pop("dynamic_ncols", None)
        number = "{n_fmt}" if options.get("unit_scale") else "{n:.5g}"
        line = LINE if options.get("total") else LINE_WITHOUT_END
        options["bar_format"] = line.replace("{n}", number)
        super().__init__(*arguments, **options)

    @staticmethod
    def status_printer(file: Any) -> Any:
        """What writes a line."""

        def show(line: str) -> None:
            file.write(f"{line}\n")
            file.flush()

        return show

    def refresh(self, *arguments: Any, **options: Any) -> None:
        """Write a line, if it is time for one."""
        now = time.monotonic()
        if not self.disable and now - self.told >= EVERY:
            self.told = now
            self.sp(str(self).strip())

    def clear(self, *arguments: Any, **options: Any) -> None:
        """Nothing: a line that is written stays."""

    def display(self, *arguments: Any, **options: Any) -> None:
        """Nothing: `refresh` and `close` write."""

    def close(self) -> None:
        """Write the last line."""
        if not self.disable:
            self.disable: bool = True
            self._decr_instances(self)
            if self.n:
                self.sp(str(self).strip())


def progress_bar(*arguments: Any, shown: bool = True, **options: Any) -> Any:
    """A progress bar with the arguments of `tqdm`: a bar in a terminal or a notebook, lines elsewhere.

    Args:
        shown: whether there is one at all.
    """
    people = sys.stderr.isatty() or "ipykernel" in sys.modules
    kind = bar_for_people if people else Lines
    return kind(*arguments, disable=not shown, **options)
