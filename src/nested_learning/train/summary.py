"""What a person wants to know when a run has ended: how long it took, where things are, what to try next."""

from __future__ import annotations

import shlex

from nested_learning.home import in_a_clone
from nested_learning.report import duration
from nested_learning.train.config import RunConfig
from nested_learning.train.trainer import TrainResult

NEXT = (
    ("generate {run} --prompt 'Call me'", "continue a text"),
    ("chat {run}", "talk to it; it remembers"),
    ("report {run}", "curves, samples and levels as one page"),
    ("eval long-perplexity --checkpoint {run}", "loss by position"),
)
"""Commands of `nl`, and what they are for."""


def summary(config: RunConfig, result: TrainResult) -> str:
    """Time, tokens, files and next commands of a run that has ended, in a few lines.

    An interrupted run has no next commands but its own.
    """
    folder = config.run_dir
    speed = result.tokens / max(result.seconds, 1e-9)
    lines = [
        f"{result.tokens:,} tokens in {duration(result.seconds)} ({speed:,.0f} tokens/s, with validation and "
        "saving)"
    ]
    kept = [
        name
        for name in ("checkpoints", "metrics.jsonl", "loss.png", "sample.txt")
        if (folder / name).exists()
    ]
    lines.append(f"{folder}: {', '.join(kept)}")
    if not result.interrupted:
        nl = "uv run nl" if in_a_clone() else "nl"
        lines.append("next:")
        lines += [f"  {nl} {text.format(run=shlex.quote(str(folder)))}  # {why}" for text, why in NEXT]
    return "\n".join(lines)
