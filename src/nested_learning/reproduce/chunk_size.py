"""Is the chunk size of the self-modifying memory a speed knob only? Validation loss at equal steps."""

from __future__ import annotations

import argparse
from dataclasses import replace

from nested_learning.report import highest, mean, show
from nested_learning.reproduce.experiment import Experiment, Options, Outcome, positive
from nested_learning.reproduce.report import Plot, Report
from nested_learning.reproduce.runner import Run
from nested_learning.reproduce.tasks import pilot_run


def add_options(parser: argparse.ArgumentParser) -> None:
    """Lengths, chunks, steps, seeds and tokens per step."""
    parser.add_argument(
        "--lengths", type=positive, nargs="+", default=[256, 1024], help="tokens per sequence"
    )
    parser.add_argument(
        "--chunks", type=positive, nargs="+", default=[64, 32, 16, 8], help="tokens per chunk"
    )
    parser.add_argument("--steps", type=positive, default=200, help="updates of a run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--tokens", type=positive, default=2048, help="tokens per step, at every length")


def plan(options: Options) -> dict[str, list[Run]]:
    """A row per length and chunk, a run per seed.

    Only the chunk of the mixer changes; fast levels of the feed-forward memory keep theirs.
    Raises ValueError for a length that does not divide the tokens per step.
    """
    for length in options.lengths:
        if options.tokens % length:
            raise ValueError(f"lengths must divide tokens = {options.tokens}, got {length}")
    base = pilot_run(options.steps)
    return {
        f"{length} | {chunk}": [
            replace(
                base,
                model=replace(base.model, chunk_size=chunk),
                seq_len=length,
                batch_size=options.tokens // length,
                seed=seed,
            )
            for seed in options.seeds
        ]
        for length in options.lengths
        for chunk in options.chunks
    }


def report(options: Options, outcome: Outcome) -> Report:
    """Mean validation loss, and its relative difference to that of the largest chunk at the same length."""
    largest = max(options.chunks)
    header = ["T", "chunk", *(f"seed {seed}" for seed in options.seeds), "mean loss", f"to chunk {largest}"]
    header += ["max gradient norm", "non-finite"]
    losses = {label: mean([result["final"] for _, result in cells]) for label, cells in outcome.items()}
    rows, numbers = [], []
    for label, cells in outcome.items():
        length, chunk = (int(part) for part in label.split(" | "))
        results = [result for _, result in cells]
        finals = [result["final"] for result in results]
        loss, reference = losses[label], losses[f"{length} | {largest}"]
        relative = None if loss is None or reference is None else loss / reference - 1
        norm, bad = highest([r["max_norm"] for r in results]), sum(r["nonfinite"] for r in results)
        percent = "not finite" if relative is None else f"{relative:+.2%}"
        shown = [show(value) for value in (*finals, loss)]
        rows.append([str(length), str(chunk), *shown, percent, show(norm, 2), str(bad)])
        row = {"length": length, "chunk": chunk, "seeds": options.seeds, "loss": finals, "mean": loss}
        numbers.append({**row, "relative": relative, "max_norm": norm, "nonfinite": bad})
    return Report(
        title="Chunk size",
        header=header,
        rows=rows,
        numbers=numbers,
        notes=_notes(options, outcome),
        plot=Plot(lines=_lines(options, losses), xlabel="chunk", ylabel="validation loss", log="x"),
    )


def _notes(options: Options, outcome: Outcome) -> list[str]:
    run, result = next(iter(outcome.values()))[0]
    model = run.model
    return [
        f"Validation loss in nats per token on the bundled text after {options.steps} steps of "
        f"{options.tokens} tokens; unigram entropy {result['unigram_entropy']:.4f}.",
        f"{model.mixer}, width {model.dim}, {model.num_layers} layers, {model.num_heads} heads, "
        f"vocabulary {model.vocab_size}, read {model.read}; the chunk is the mixer's.",
    ]


def _lines(
    options: Options, losses: dict[str, float | None]
) -> list[tuple[str, list[tuple[float, float | None]]]]:
    return [
        (f"T = {length}", [(chunk, losses[f"{length} | {chunk}"]) for chunk in sorted(options.chunks)])
        for length in options.lengths
    ]


EXPERIMENT = Experiment(
    name="chunk-size",
    help="validation loss on the bundled text for several chunk sizes at equal steps",
    add_options=add_options,
    quick={"steps": 1, "seeds": [0], "lengths": [256], "chunks": [64, 32], "tokens": 256},
    plan=plan,
    report=report,
)
