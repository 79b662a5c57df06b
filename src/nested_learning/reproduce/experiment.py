"""An experiment: its options, its runs, its report. All start and end in the same way, here."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nested_learning.reproduce.report import Report
from nested_learning.reproduce.runner import Result, Run, locked_results, run_all
from nested_learning.runtime import pick_device
from nested_learning.train.compiling import missing_compiler

Options = argparse.Namespace
Plan = Mapping[str, list[Run]]
Outcome = dict[str, list[tuple[Any, Result]]]


def positive(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


@dataclass(frozen=True, kw_only=True, slots=True)
class Experiment:
    """A table that a laptop can make.

    Args:
        name, help: as the command line shows them.
        add_options: adds the options of this experiment.
        quick: values of options that `--quick` puts in place of those given: seconds, and no result to quote.
        plan: the runs of every row of the table.
        report: the table, from runs and results of every row.
        follow_ups: each gives further runs, chosen by the outcome of those before.
        begin: makes what the runs need, such as their text, before the first one starts.
        device: where runs train if `--device` does not say.
        compiles: whether its runs train in the plain loop, which can compile their models.
    """

    name: str
    help: str
    add_options: Callable[[argparse.ArgumentParser], None]
    quick: Mapping[str, Any]
    plan: Callable[[Options], Plan]
    report: Callable[[Options, Outcome], Report]
    follow_ups: tuple[Callable[[Options, Outcome], Plan], ...] = ()
    begin: Callable[[Options], None] | None = None
    device: str = "cpu"
    compiles: bool = True

    def add_to(self, parser: argparse.ArgumentParser) -> None:
        """Add the options of this experiment and those that all have."""
        self.add_options(parser)
        parser.add_argument("--jobs", type=positive, default=2, help="runs at a time, one thread each")
        parser.add_argument("--device", default=self.device, help="cpu, cuda, cuda:1, … or auto")
        if self.compiles:
            compiled = "compile the models: a minute at the start, then faster where chunks are small"
            parser.add_argument("--compile", action="store_true", help=compiled)
        else:
            parser.set_defaults(compile=False)
        parser.add_argument("--quick", action="store_true", help="a few steps, to see that it works")
        parser.add_argument("--fresh", action="store_true", help="run everything again")
        default = f"outputs/reproduce/{self.name}, with -quick added by --quick"
        parser.add_argument("--output", type=Path, help=f"folder for the results (default: {default})")

    def prepare(self, options: Options) -> Plan:
        """The runs that `options` ask for. Raises ValueError for options that do not go together, and for
        `--compile` where nothing can be compiled."""
        missing = missing_compiler(pick_device(options.device, "--device")) if options.compile else None
        if missing is not None:
            raise ValueError(f"--compile cannot work here: {missing}")
        if options.quick:
            vars(options).update(self.quick)
        return self.plan(options)

    def run(self, options: Options, plan: Plan) -> Report:
        """Run what is not finished of `plan`, write the report to the output folder and print it."""
        folder = output_folder(self.name, options)
        path = folder / "runs.jsonl"
        if options.fresh:
            with locked_results(path):
                path.unlink(missing_ok=True)
        if self.begin is not None:
            self.begin(options)
        outcome = _outcome(plan, path, options)
        for follow_up in self.follow_ups:
            outcome |= _outcome(follow_up(options, outcome), path, options)
        report = self.report(options, outcome)
        report.write(folder)
        print(f"\n{report.markdown()}\nresults in {folder.resolve()}")
        return report


def output_folder(name: str, options: Options) -> Path:
    """Where the results of the experiment called `name` go."""
    chosen: Path | None = options.output
    return chosen or Path("outputs/reproduce") / (name + "-quick" * options.quick)


def _outcome(plan: Plan, path: Path, options: Options) -> Outcome:
    runs = [run for row in plan.values() for run in row]
    results = iter(run_all(runs, path, options.jobs, device=options.device, compiled=options.compile))
    return {label: [(run, next(results)) for run in row] for label, row in plan.items()}
