"""Figure 10 of the paper in small: what does more context than in training do to the loss?

Models are trained at T tokens and read spans of long documents at up to several times T. The same last
tokens of every span are predicted with more and more of the span before them, so that only the context
differs; and the losses of whole spans are shown by position.

Shapes: S spans, n tokens of a span.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain, zip_longest

import numpy as np
import torch
from torch import Tensor

from nested_learning.data.corpus import Corpus, load_corpus
from nested_learning.eval.perplexity import bin_sums, position_bins
from nested_learning.eval.scorer import read_losses
from nested_learning.models.bill import count_parameters
from nested_learning.models.config import HopeConfig
from nested_learning.models.lm import HopeLM
from nested_learning.report import interval
from nested_learning.reproduce.contenders import CONTENDERS, same_size
from nested_learning.reproduce.experiment import Experiment, Options, Outcome, positive
from nested_learning.reproduce.report import Plot, Points, Report
from nested_learning.reproduce.runner import Result, Run, Tick
from nested_learning.reproduce.tasks import TextRun
from nested_learning.reproduce.texts import QUICK, TextDefaults, add_text_options, describe, text_run
from nested_learning.train.plain_loop import device_of, finite_or_none

MODELS = ("hope", "titans", "gated_delta", "sliding_attention", "transformer")
AT_ONCE = 16
"""Spans that are read together."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ContextRun:
    """One training on text, and the losses of the trained model by context.

    Args:
        text: the training.
        contexts: tokens read before those that are asked for; the largest decides the length of a span.
        asked: last tokens of a span, whose losses are compared.
        spans: at most so many, from all held-out documents in turn.
    """

    text: TextRun
    contexts: tuple[int, ...]
    asked: int = 64
    spans: int = 64

    @property
    def steps(self) -> int:
        """Length of the training."""
        return self.text.steps

    def run(self, tick: Tick) -> Result:
        """Train, then read. The result holds what the training does, and the mean losses (nats per token;
        None if not finite) `by_context` and, of whole spans, `by_bin` (the bins of `position_bins`)."""
        model, result = self.text.trained(tick)
        spans = held_out_spans(load_corpus(self.text.data), self.span, self.spans)
        by_context = [loss_after(model, spans, context, self.asked) for context in self.contexts]
        return {
            **result,
            "spans": len(spans),
            "by_context": [finite_or_none(loss) for loss in by_context],
            "by_bin": [finite_or_none(loss) for loss in losses_by_position(model, spans)],
        }

    @property
    def span(self) -> int:
        """Predicted tokens of a span."""
        return max(self.contexts) + self.asked


def held_out_spans(corpus: Corpus, length: int, most: int) -> Tensor:
    """Spans `[S, length + 1]` of the held-out documents: the first of every document, then the second, …

    Raises:
        ValueError: no document has so many tokens.
    """
    tokens = np.asarray(corpus.valid[: len(corpus.valid)]).astype(np.int64)
    documents = np.split(tokens, np.flatnonzero(tokens == corpus.tokenizer.eos_id) + 1)
    size = length + 1
    by_document = [
        [document[first : first + size] for first in range(0, len(document) - size + 1, size)]
        for document in documents
    ]
    in_turn = [span for span in chain.from_iterable(zip_longest(*by_document)) if span is not None]
    if not in_turn:
        longest = max(map(len, documents))
        raise ValueError(f"spans of {size} tokens are longer than the longest held-out document, {longest}")
    return torch.from_numpy(np.stack(in_turn[:most]))


@torch.no_grad()
def loss_after(model: HopeLM, spans: Tensor, context: int, asked: int) -> float:
    """Mean loss of the last `asked` tokens of `spans [S, n + 1]`, read from `context` tokens before them."""
    rows = spans[:, -(context + asked + 1) :]
    losses = [
        read_losses(model, part)[:, -asked:] for part in torch.split(rows.to(device_of(model)), AT_ONCE)
    ]
    return float(torch.cat(losses).mean())


@torch.no_grad()
def losses_by_position(model: HopeLM, spans: Tensor) -> list[float]:
    """Mean loss of every bin of positions of `spans [S, n + 1]`."""
    parts = torch.split(spans.to(device_of(model)), AT_ONCE)
    losses = torch.cat([read_losses(model, part) for part in parts]).cpu().double().mean(0)
    widths = [last - first + 1 for first, last in position_bins(len(losses))]
    return [total / width for total, width in zip(bin_sums(losses), widths, strict=True)]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Models, contexts, and the options of text."""
    add = parser.add_argument
    add("--models", nargs="+", choices=list(CONTENDERS), default=list(MODELS))
    add("--multiples", type=float, nargs="+", default=[0.25, 0.5, 1, 2, 4], help="contexts, over --length")
    add("--asked", type=positive, default=64, help="last tokens of a span, which are compared")
    add("--spans", type=positive, default=64, help="spans of held-out text")
    add_text_options(parser, TextDefaults())


def plan(options: Options) -> dict[str, list[Run]]:
    """A row per model, a run per seed. Raises ValueError for contexts that no held-out document has."""
    text = text_run(options)
    contexts = tuple(sorted(max(1, round(options.length * times)) for times in options.multiples))
    run = ContextRun(text=text, contexts=contexts, asked=options.asked, spans=options.spans)
    held_out_spans(load_corpus(text.data), run.span, 1)
    models = equal_models(text.model, options.models, window=max(1, options.length // 2))
    return {
        name: [replace(run, text=replace(text, model=model, seed=seed)) for seed in options.seeds]
        for name, model in models.items()
    }


def equal_models(base: HopeConfig, names: Sequence[str], window: int) -> dict[str, HopeConfig]:
    """Contenders by label, made of `base`, with as many parameters as the first of them."""
    models: dict[str, HopeConfig] = {}
    parameters: int | None = None
    for name in names:
        model = CONTENDERS[name].build(base)
        if model.mixer == "sliding_attention":
            model.window = window
        parameters = parameters or count_parameters(model)
        models[CONTENDERS[name].label] = same_size(model, parameters)
    return models


def report(options: Options, outcome: Outcome) -> Report:
    """Loss of the same tokens by context, and how it changes beyond the training length."""
    run: ContextRun = next(iter(outcome.values()))[0][0]
    header = ["model", "parameters", "validation loss", *(f"{c} tokens" for c in run.contexts)]
    header.append(f"beyond {run.text.seq_len}")
    rows, numbers = [], []
    for name, cells in outcome.items():
        results = [result for _, result in cells]
        by_context = _by_seed(results, "by_context")
        parameters, valid = results[0]["parameters"], [result["final"] for result in results]
        shown = [interval(losses) for losses in by_context]
        rows.append([name, f"{parameters:,}", interval(valid), *shown, _beyond(run, by_context)])
        row = {"model": name, "seeds": options.seeds, "parameters": parameters, "final": valid}
        row |= {"contexts": run.contexts, "by_context": by_context, "positions": position_bins(run.span)}
        numbers.append({**row, "by_bin": _by_seed(results, "by_bin")})
    return Report(
        title="Loss by context, beyond the training length",
        header=header,
        rows=rows,
        numbers=numbers,
        notes=_notes(options, outcome),
        plot=Plot(
            lines=_lines(outcome),
            xlabel=f"tokens of context (trained at {run.text.seq_len})",
            ylabel=f"loss of the same {run.asked} tokens (nats per token)",
            log="x",
        ),
    )


def _by_seed(results: Sequence[Result], key: str) -> list[list[float | None]]:
    """For every context or bin the losses of all seeds."""
    return [list(losses) for losses in zip(*(result[key] for result in results), strict=True)]


def _beyond(run: ContextRun, by_context: list[list[float | None]]) -> str:
    """Change from the longest context of the training length or less to the longest of all, by seed."""
    inside = max(
        i for i, context in enumerate(run.contexts) if context <= max(run.text.seq_len, run.contexts[0])
    )
    pairs = zip(by_context[inside], by_context[-1], strict=True)
    changes = [None if a is None or b is None else b - a for a, b in pairs]
    return interval(changes, "+.4f").replace("± +", "± ")


def _notes(options: Options, outcome: Outcome) -> list[str]:
    run, result = next(iter(outcome.values()))[0]
    return [
        describe(options, run.text, result),
        f"Loss (nats per token) of the last {run.asked} tokens of {result['spans']} spans of held-out "
        "documents, read from so many tokens before them: the tokens that are predicted are the same in all "
        f"columns. The last column: from {run.text.seq_len} tokens of context to {max(run.contexts)}, by "
        "seed; below 0: more context than in training helps.",
        f"The window of sliding attention is {max(1, options.length // 2)} tokens. All models have the same "
        "learning rate. `results.json` also has the losses of whole spans by position.",
    ]


def _lines(outcome: Outcome) -> list[tuple[str, Points]]:
    return [
        (name, list(zip(map(float, run.contexts), result["by_context"], strict=True)))
        for name, cells in outcome.items()
        for run, result in cells
    ]


EXPERIMENT = Experiment(
    name="context",
    help="loss by context, up to 4 times the training length (the paper's Figure 10)",
    add_options=add_options,
    quick={**QUICK, "spans": 4, "asked": 8},
    plan=plan,
    report=report,
)
