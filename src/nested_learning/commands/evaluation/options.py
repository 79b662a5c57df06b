"""Options that several evaluations share: the checkpoint, the grid of haystacks, and `--memorize`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nested_learning.adapt.config import PATHS, AdaptConfig
from nested_learning.eval import loading
from nested_learning.eval.arms import Memorize
from nested_learning.eval.haystack import Grid
from nested_learning.eval.results import summarise

ADAPT_FIELDS = {"memorize_steps": "steps", "memorize_paths": "paths", "memorize_lr": "lr"}
"""Option → field of `AdaptConfig`."""


def add_checkpoint_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of every evaluation of one checkpoint."""
    add = parser.add_argument
    add("--checkpoint", help="run folder (FOLDER:best: its best), checkpoint, exported file; untrained")
    add_model_options(parser)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `add_checkpoint_options` without the checkpoint, for evaluations of several."""
    add = parser.add_argument
    add("--config", help="configuration instead of the checkpoint's own")
    add("--tokenizer-path", type=Path, help="SentencePiece model instead of the checkpoint's own")
    add("--device", default="cpu", help="auto, cpu, cuda, cuda:0 … or mps (default %(default)s)")
    add("--output", type=Path, help=f"result file (.json); default: below {loading.OUTPUT}, by checkpoint")
    add("--fresh", action="store_true", help="forget the samples of an earlier, unfinished evaluation")


def load_from(options: argparse.Namespace) -> loading.Loaded:
    """Load the checkpoint that the options name.

    Raises:
        CheckpointError, ValueError, FileNotFoundError: see `loading.load`; a ValueError too if there is no
            `--checkpoint`.
    """
    if options.checkpoint is None:
        raise ValueError("--checkpoint is missing")
    return loading.load(options.checkpoint, options.config, options.tokenizer_path, options.device)


def add_grid_options(parser: argparse.ArgumentParser, lengths: Sequence[int], max_new_tokens: int) -> None:
    """Add the options of `Grid`, with these defaults, but not its tasks."""
    add = parser.add_argument
    add("--context-lengths", type=int, nargs="+", default=lengths, help="tokens (default %(default)s)")
    add(
        "--samples-per-length", type=int, default=20, help="samples per task and length (default %(default)s)"
    )
    add("--depths", type=int, default=5, help="depths of the needle, evenly spread (default %(default)s)")
    room = "room for the answer (default %(default)s)"
    add("--max-new-tokens", type=int, default=max_new_tokens, help=room)
    add("--seed", type=int, default=42, help="seed of the samples (default %(default)s)")


def grid_from(options: argparse.Namespace, tasks: Sequence[str]) -> Grid:
    """The grid that the options of `add_grid_options` describe."""
    return Grid(
        tasks=tuple(tasks),
        context_lengths=tuple(options.context_lengths),
        samples_per_length=options.samples_per_length,
        depths=options.depths,
        seed=options.seed,
        max_new_tokens=options.max_new_tokens,
        memorize=memorize_from(options),
    )


def add_memorize_options(parser: argparse.ArgumentParser) -> None:
    """Add the `--memorize` options."""
    default = AdaptConfig()
    add = parser.add_argument_group("learning at test time (docs/adaptation.md)").add_argument
    add("--memorize", action="store_true", help="score also a model that has memorized what it was shown")
    add("--memorize-steps", type=int, help=f"gradient steps on a chunk (default {default.steps})")
    add("--memorize-lr", type=float, help=f"step size (default {default.lr})")
    add("--memorize-paths", choices=PATHS, help=f"weights that learn (default {default.paths})")
    threshold = "--memorize-surprise-threshold"
    add(threshold, type=float, help="learn only from chunks whose surprise (l2, 0 to 1.41) reaches it")
    add("--memorize-no-reset", action="store_true", help="keep what was learned for the next samples")
    answer = "--memorize-use-correct-answer"
    add(answer, action="store_true", help="memorize the right answers too; marked in the result")


def memorize_from(options: argparse.Namespace) -> Memorize | None:
    """How the model learns, by the options of `add_memorize_options`; None without `--memorize`.

    Raises:
        ValueError: an option without `--memorize`, or a value that is not allowed.
    """
    given = {name: value for name, value in vars(options).items() if name.startswith("memorize_")}
    used = [name for name, value in given.items() if value is not None and value is not False]
    if not options.memorize:
        if used:
            raise ValueError(f"--{used[0].replace('_', '-')} needs --memorize")
        return None
    values: dict[str, Any] = {
        field: given[name] for name, field in ADAPT_FIELDS.items() if given[name] is not None
    }
    if options.memorize_surprise_threshold is not None:
        values |= {"surprise": "l2", "threshold": options.memorize_surprise_threshold}
    adapt = AdaptConfig(reset=not options.memorize_no_reset, **values)
    return Memorize(adapt=adapt, use_correct_answer=options.memorize_use_correct_answer)


def tasks_from(text: str, known: Sequence[str]) -> tuple[str, ...]:
    """The names in a text such as "piqa,boolq"; "all" stands for all that are known."""
    return tuple(known) if text == "all" else tuple(text.split(","))


def print_result(output: Path) -> None:
    """Print the table of a result file, and where the file is."""
    print(summarise([output]), end="")
    print(f"results in {output.parent.resolve()}")
