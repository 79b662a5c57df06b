"""Does training stay finite? Memories of every kind at several chunk sizes and learning rates."""

from __future__ import annotations

import argparse
from dataclasses import replace
from itertools import product

from nested_learning.report import show
from nested_learning.reproduce.contenders import CONTENDERS, build_row, row_label
from nested_learning.reproduce.experiment import Experiment, Options, Outcome, positive
from nested_learning.reproduce.report import Plot, Report
from nested_learning.reproduce.runner import Result, Run
from nested_learning.reproduce.tasks import TextRun, pilot_run

# "eta_bias=0" starts at half the bound, where the clamp and the cap have something to do from the first step.
ROWS = (
    "hope",
    "hope_linear",
    "hope_linear memory.eta_max=2 memory.eta_bias=0",
    "hope_linear memory.retention_target=zero memory.eta_max=2 memory.eta_bias=0 memory.injection_cap=true",
    "titans",
    "gated_delta",
)
HELD_OUT = 8  # batches of the evaluation


def add_options(parser: argparse.ArgumentParser) -> None:
    """Models, chunks, learning rates, steps, batches and seeds."""
    add = parser.add_argument
    models = f'of {", ".join(CONTENDERS)}; with options of the model behind: "hope memory.momentum=true"'
    add("--models", nargs="+", default=list(ROWS), help=models)
    add("--chunks", type=positive, nargs="+", default=[4, 16, 64], help="tokens between two writes")
    add("--lrs", type=float, nargs="+", default=[3e-3, 1e-2, 3e-2], help="highest learning rates")
    add("--steps", type=positive, default=60, help="updates of a run")
    add("--length", type=positive, default=128, help="tokens per sequence")
    add("--batch", type=positive, default=4, help="sequences per step")
    add("--seeds", type=int, nargs="+", default=[0])


def plan(options: Options) -> dict[str, list[Run]]:
    """A row per model, chunk and learning rate; a run per seed. Fast levels keep their own chunk.

    Raises ValueError for a model, option or value that does not exist.
    """
    base = replace(pilot_run(options.steps), seq_len=options.length, batch_size=options.batch)
    tokens = HELD_OUT * options.length * options.batch
    base = replace(base, eval_every=options.steps, eval_tokens=tokens)
    return {
        f"{row} | {chunk} | {lr:g}": [_run(base, row, chunk, lr, seed) for seed in options.seeds]
        for row, chunk, lr in product(options.models, options.chunks, options.lrs)
    }


def _run(base: TextRun, row: str, chunk: int, lr: float, seed: int) -> TextRun:
    model = build_row(row, replace(base.model, chunk_size=chunk))
    return replace(base, model=model, optim=replace(base.optim, lr=lr), seed=seed)


def report(options: Options, outcome: Outcome) -> Report:
    """Steps with a loss or gradient that is not finite, gradient norms before clipping, worst final loss."""
    header = ["model", "chunk", "learning rate", "non-finite steps", "max gradient norm", "median"]
    header.append("validation loss")
    rows, numbers = [], []
    for label, cells in outcome.items():
        results = [result for _, result in cells]
        nonfinite = sum(result["nonfinite"] for result in results)
        top, middle, final = (_worst(results, key) for key in ("max_norm", "median_norm", "final"))
        model, chunk, lr = label.split(" | ")
        rows.append([row_label(model), chunk, lr, str(nonfinite), show(top, 2), show(middle, 3), show(final)])
        row = {"model": model, "chunk": int(chunk), "lr": cells[0][0].optim.lr, "seeds": options.seeds}
        row |= {"nonfinite": nonfinite, "max_norm": top, "median_norm": middle, "final": final}
        numbers.append({**row, "steps": [result["steps"] for result in results]})
    run, result = next(iter(outcome.values()))[0]
    return Report(
        title="Stability",
        header=header,
        rows=rows,
        numbers=numbers,
        notes=[
            f"{options.steps} steps of the model of `configs/pilot_smoke.yaml` ({run.batch_size} sequences "
            f"of {run.seq_len} tokens), gradients clipped at {run.optim.clip_norm}; norms before that. The "
            f"worst of seeds {options.seeds}. Losses in nats per token, unigram entropy "
            f"{result['unigram_entropy']:.4f}.",
        ],
        plot=Plot(lines=_lines(outcome), xlabel="step", ylabel="gradient norm before clipping", log="y"),
    )


def _worst(results: list[Result], key: str) -> float | None:
    """The largest value over seeds; None if one is not finite."""
    values = [result[key] for result in results]
    return None if None in values else max(values)


def _lines(outcome: Outcome) -> list[tuple[str, list[tuple[float, float | None]]]]:
    return [
        (row_label(label.split(" | ")[0]), list(enumerate(result["norms"], start=1)))
        for label, cells in outcome.items()
        for _, result in cells
    ]


EXPERIMENT = Experiment(
    name="stability",
    help="chunk sizes and learning rates with memories of every kind: non-finite steps, largest gradients",
    add_options=add_options,
    quick={"steps": 1, "seeds": [0], "chunks": [16], "lrs": [3e-3], "length": 32, "batch": 1},
    plan=plan,
    report=report,
)
