"""Options that `nl generate` and `nl chat` share: the checkpoint, and how tokens are drawn."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nested_learning.models.sampling import SamplerOptions

TEMPERATURE, TOP_K, SEED = 0.8, 40, 0


def add_sampling_options(parser: argparse.ArgumentParser, max_new_tokens: int) -> None:
    """Add the checkpoint and the options of `sampler_from`."""
    add = parser.add_argument
    add("checkpoint", help="run folder (FOLDER:best: its best), checkpoint, or exported file")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:0 … or mps (default %(default)s)")
    add("--max-new-tokens", type=int, default=max_new_tokens, help="the most tokens (default %(default)s)")
    add("--temperature", type=float, default=TEMPERATURE, help="0: the likeliest (default %(default)s)")
    add("--top-k", type=int, default=TOP_K, help="of the k likeliest only; 0: all (default %(default)s)")
    add("--top-p", type=float, help="of the smallest set of this probability only")
    add("--seed", type=int, default=SEED, help="of the sampling (default %(default)s)")
    add("--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be repeated")


def sampler_from(options: argparse.Namespace) -> SamplerOptions:
    """The arguments of `models.sampling.Sampler` that the options name."""
    return {
        "max_new_tokens": options.max_new_tokens,
        "temperature": options.temperature,
        "top_k": options.top_k or None,
        "top_p": options.top_p,
        "seed": options.seed,
    }
