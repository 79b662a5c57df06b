"""Options that experiments on text share: which text, what size of model, how long; and the run they make."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

from nested_learning.config import load_config
from nested_learning.data.corpus import load_corpus
from nested_learning.models.config import HopeConfig
from nested_learning.reproduce.experiment import Options, positive
from nested_learning.reproduce.runner import Result
from nested_learning.reproduce.tasks import TextRun

QUICK = {
    **{"steps": 1, "seeds": [0], "dim": 16, "layers": 1, "heads": 2},
    **{"length": 16, "batch": 2, "chunk": 8, "eval_tokens": 64},
}
"""What `--quick` makes of the options below."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TextDefaults:
    """Sizes of a model and of its batches, as defaults of an experiment's options."""

    dim: int = 64
    layers: int = 2
    heads: int = 2
    chunk: int = 32
    length: int = 128
    batch: int = 8
    steps: int = 120


def add_text_options(
    parser: argparse.ArgumentParser, sizes: TextDefaults, lrs: tuple[float, ...] | None = None
) -> None:
    """Text, sizes, one learning rate (or `--lrs` to choose from), steps and seeds."""
    add = parser.add_argument
    data = (
        "a choice of configs/data, such as local or bytes; behind it, fields: data.tokenizer.vocab_size=4096"
    )
    add("--data", nargs="+", default=["bundled"], help=data)
    add("--text", type=Path, help="a plain text file, or a folder of them, instead of that choice's text")
    add("--dim", type=positive, default=sizes.dim, help="model width")
    add("--layers", type=positive, default=sizes.layers, help="blocks")
    add("--heads", type=positive, default=sizes.heads, help="heads of every mixer")
    add("--chunk", type=positive, default=sizes.chunk, help="tokens between two writes of a memory")
    add("--length", type=positive, default=sizes.length, help="tokens per sequence")
    add("--batch", type=positive, default=sizes.batch, help="sequences per step")
    if lrs is None:
        add("--lr", type=float, default=3e-3, help="highest learning rate of every model")
    else:
        add("--lrs", type=float, nargs="+", default=list(lrs), help="learning rates to choose from")
    add("--steps", type=positive, default=sizes.steps, help="updates of a run")
    add("--eval-tokens", type=positive, default=32_768, help="held-out tokens of an evaluation")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])


def text_run(options: Options) -> TextRun:
    """The run of our default that `options` of `add_text_options` ask for, optimized as in `pilot_smoke`.

    Raises:
        FileNotFoundError, ValueError: a text or a size that cannot be used.
    """
    config = load_config("pilot_smoke", [f"data={options.data[0]}", *options.data[1:]])
    data = config.data
    if options.text is not None:
        data = replace(data, files=(str(options.text.expanduser().resolve()),), shards=None)
    corpus = load_corpus(data)  # once and here: parallel runs then only open it
    return TextRun(
        model=with_sizes(config.model, options, corpus.tokenizer.vocab_size),
        optim=replace(config.optim, lr=getattr(options, "lr", config.optim.lr)),
        data=data,
        seq_len=options.length,
        batch_size=options.batch,
        steps=options.steps,
        eval_every=options.steps,
        eval_tokens=options.eval_tokens,
    )


def with_sizes(model: HopeConfig, options: Options, vocab_size: int) -> HopeConfig:
    """`model` with the sizes of `options`. A fast level is written as often as a memory of the mixer."""
    fast = {level.name for level in model.levels if model.level_kind(level) == "fast"}
    levels = tuple(
        replace(level, chunk_size=options.chunk) if level.name in fast else level for level in model.levels
    )
    return replace(
        model,
        vocab_size=vocab_size,
        dim=options.dim,
        num_layers=options.layers,
        num_heads=options.heads,
        chunk_size=options.chunk,
        seq_len=None,
        levels=levels,
    )


def describe(options: Options, run: TextRun, result: Result) -> str:
    """A sentence of the table's remarks: what was trained on what."""
    rate = f", AdamW {run.optim.lr:g}" if hasattr(options, "lr") else ", AdamW"
    text = f"data={options.data[0]}" if options.text is None else options.text.name
    model = run.model
    return (
        f"{options.steps} steps of {run.batch_size} x {run.seq_len} tokens ({text}, vocabulary "
        f"{model.vocab_size}, {result['bytes_per_token']:.2f} bytes per token, unigram entropy "
        f"{result['unigram_entropy']:.3f}); width {model.dim}, {model.num_layers} layers, {model.num_heads} "
        f"heads, chunk {model.chunk_size}{rate}; seeds {options.seeds}."
    )
