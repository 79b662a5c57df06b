"""Loss by position in long texts: does a model predict better the more it has read?

Texts are cut into spans of one length, each read in a new context that begins with the end-of-text token.
The positions 1, 2, 3–4, 5–8, … of a span are averaged together. Beside them stand the perplexity per token,
and per byte and word, which do not depend on the tokenizer.

With memorizing, the model learns while it reads, every token being scored before it is learned from; with the
"right answer" it has read the whole span once before, in a context of its own.

Shapes: B batch, T tokens of a span.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise, zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nested_learning.adapt import memorize as adapt_memorize
from nested_learning.adapt import score as adapt_score
from nested_learning.data.corpus import bundled_files, split_documents, split_validation, text_files
from nested_learning.data.records import format_of, read_records, read_text
from nested_learning.data.tokenizer import Tokenizer, encode_document
from nested_learning.eval.loading import Loaded
from nested_learning.eval.memorize import Memorize
from nested_learning.eval.plots import new_figure
from nested_learning.eval.results import (
    BASELINE,
    Metric,
    Result,
    Row,
    average,
    evaluate_batches,
    samples_path,
    start_fresh,
    versions,
    write_result,
)
from nested_learning.eval.scorer import SEGMENT

TOTALS = ("tokens", "bytes", "words")


@dataclass(frozen=True, kw_only=True, slots=True)
class LongTexts:
    """What to read.

    Args:
        files: .txt (documents end at a line that is a form feed) or .jsonl (field "text"), folders of them or
            patterns; none = the last part of the bundled texts, which training on them holds out.
        length: tokens of a span.
        max_samples: at most so many spans, from all documents in turn; None = all.
        batch_size: spans read together.
        memorize: how the model learns; None = it does not.
    """

    files: tuple[Path, ...] = ()
    length: int = 2048
    max_samples: int | None = 16
    batch_size: int = 1
    memorize: Memorize | None = None

    def __post_init__(self) -> None:
        for name in ("length", "max_samples", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.memorize and not self.memorize.adapt.reset and self.batch_size > 1:
            raise ValueError(
                f"batch_size must be 1 where spans begin with what was learned, got {self.batch_size}"
            )

    def settings(self) -> dict[str, Any]:
        """For the result file and the log."""
        return {
            "files": [str(path) for path in self.files],
            "length": self.length,
            "max_samples": self.max_samples,
            "batch_size": self.batch_size,
            "memorize": self.memorize.settings() if self.memorize else None,
        }


def evaluate_perplexity(loaded: Loaded, plan: LongTexts, output: Path, fresh: bool = False) -> Result:
    """Read long texts, write `output`, and draw the loss by position beside it.

    Raises:
        FileNotFoundError, ValueError: files that cannot be used, or no document of `plan.length` tokens.
    """
    log = samples_path(output)
    if fresh:
        start_fresh(log)
    spans = cut_spans(read_documents(plan.files, loaded.config.data.valid_fraction), loaded.tokenizer, plan)
    settings = {"evaluation": "long_perplexity", "checkpoint": loaded.sha256, **plan.settings()}
    reader = Reader(loaded, plan.memorize)
    rows = evaluate_batches(log, settings, spans, reader.read, plan.batch_size, "long texts", reader.replay)
    arms = [BASELINE, *([plan.memorize.arm] if plan.memorize else [])]
    metrics = [metric for arm in arms for metric in span_metrics(rows, arm, plan.length)]
    result = Result(
        evaluation="long_perplexity",
        checkpoint=loaded.describe(),
        settings=plan.settings(),
        versions=versions(),
        metrics=metrics,
        samples=len(rows),
    )
    write_result(output, result)
    draw_positions({loaded.config.name: result}, output.with_suffix(".png"))
    return result


def read_documents(files: Sequence[Path], valid_fraction: float) -> list[str]:
    """Texts of files, or the held-out ends of the bundled ones.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line of a .jsonl without a text.
    """
    if not files:
        ends = [split_validation(read_text(path), valid_fraction)[1] for path in bundled_files()]
        return [document for end in ends for document in split_documents(end)]
    found: list[str] = []
    for path in text_files(files, "files", print, (".jsonl",)):
        if format_of(path) != ".jsonl":
            found += split_documents(read_text(path))
            continue
        for where, record in read_records(path):
            if not isinstance(record.get("text"), str):
                raise ValueError(f'{where}: there must be a text in the field "text"')
            found.append(record["text"])
    return found


def cut_spans(documents: Sequence[str], tokenizer: Tokenizer, plan: LongTexts) -> list[tuple[str, list[int]]]:
    """Spans of `plan.length` tokens with a key each: the first of every document, the second of every, …

    Raises:
        ValueError: no document has so many tokens.
    """
    size, longest = plan.length, 0
    by_document: list[list[tuple[str, list[int]]]] = []
    for number, text in enumerate(documents):
        ids: list[int] = encode_document(tokenizer, text)[:-1].tolist()
        longest = max(longest, len(ids))
        firsts = range(0, len(ids) - size + 1, size)
        by_document.append([(f"{number}/{first}", ids[first : first + size]) for first in firsts])
    in_turn = [span for span in chain.from_iterable(zip_longest(*by_document)) if span is not None]
    if not in_turn:
        raise ValueError(f"length must be at most the {longest} tokens of the longest document, got {size}")
    return in_turn[: plan.max_samples]


class Reader:
    """Reads spans, as the model is and learning; keeps what is carried from span to span."""

    def __init__(self, loaded: Loaded, memorize: Memorize | None = None) -> None:
        self.loaded, self.memorize, self.carried = loaded, memorize, None

    def read(self, spans: Sequence[list[int]]) -> list[Row]:
        """Sums of a span's losses by bin of positions, for every arm; and what it consists of."""
        eos, device = self.loaded.tokenizer.eos_id, self.loaded.device
        tokens = torch.tensor([[eos, *span] for span in spans], device=device)
        losses = {BASELINE: self._plain(tokens)}
        if self.memorize is not None:
            losses[self.memorize.arm] = self._learning(tokens, self.memorize)
        rows: list[Row] = []
        for i, span in enumerate(spans):
            text = self.loaded.tokenizer.decode(span)
            counts = {"tokens": len(span), "bytes": len(text.encode()), "words": len(text.split())}
            rows.append({**counts, **{arm: bin_sums(values[i]) for arm, values in losses.items()}})
        return rows

    def replay(self, span: list[int]) -> None:
        """Learn from a span that was scored before an interruption."""
        if self.memorize is not None and not self.memorize.adapt.reset:
            eos, device = self.loaded.tokenizer.eos_id, self.loaded.device
            self._learning(torch.tensor([[eos, *span]], device=device), self.memorize)

    def _plain(self, tokens: Tensor, state: Any = None) -> Tensor:
        """Losses `[B, T]`, read in segments to keep few logits at a time."""
        parts = []
        for first in range(0, tokens.shape[1] - 1, SEGMENT):
            losses, state = adapt_score(self.loaded.model, tokens[:, first : first + SEGMENT + 1], state)
            parts.append(losses)
        return torch.cat(parts, 1)

    def _learning(self, tokens: Tensor, how: Memorize) -> Tensor:
        """Losses `[B, T]` from before learning; or those of a second reading."""
        model = self.loaded.model
        report, state = adapt_memorize(model, tokens, self.carried, how.adapt)
        self.carried = how.carried(model, state)
        if not how.use_correct_answer:
            return report.losses
        return self._plain(tokens, how.memory(model, state))


def position_bins(length: int) -> list[tuple[int, int]]:
    """First and last position of the bins 1, 2, 3–4, 5–8, … of a span; the last one may be shorter."""
    edges = [0, *(2**k for k in range((length - 1).bit_length())), length]
    return [(before + 1, last) for before, last in pairwise(edges)]


def bin_sums(losses: Tensor) -> list[float]:
    """Sums of `losses [T]` over the bins of positions."""
    wide = losses.double()
    return [float(wide[first - 1 : last].sum()) for first, last in position_bins(len(losses))]


def span_metrics(rows: Sequence[Row], arm: str, length: int) -> Iterator[Metric]:
    """Perplexities, then the loss of every bin. Intervals are over spans."""
    nats = [sum(row[arm]) for row in rows]
    for unit in TOTALS:
        counts = [row[unit] for row in rows]
        if sum(counts):
            yield perplexity(f"perplexity per {unit.removesuffix('s')}", nats, counts, arm)
    for number, (first, last) in enumerate(position_bins(length)):
        losses = [row[arm][number] / (last - first + 1) for row in rows]
        yield average(f"positions {first}-{last}", "loss", losses, arm=arm)


def perplexity(name: str, nats: Sequence[float], counts: Sequence[int], arm: str) -> Metric:
    """exp(nats / counts), both summed over spans; the interval by the delta method for a ratio."""
    ratio, n = sum(nats) / sum(counts), len(nats)
    value = math.exp(ratio)
    if n < 2:
        return Metric(task="all positions", name=name, value=value, n=n, arm=arm)
    rest = [x - ratio * count for x, count in zip(nats, counts, strict=True)]
    spread = math.sqrt(n / (n - 1) * sum(r * r for r in rest)) / sum(counts)
    low, high = (math.exp(ratio + side * 1.96 * spread) for side in (-1, 1))
    return Metric(
        task="all positions", name=name, value=value, low=low, high=high, stderr=value * spread, n=n, arm=arm
    )


def draw_positions(results: dict[str, Result], path: Path) -> None:
    """Loss by position of one or several results, with 95 % intervals, as a PNG."""
    figure = new_figure(7, 4)
    axes = figure.add_subplot()
    for label, result in results.items():
        for arm in dict.fromkeys(metric.arm for metric in result.metrics):
            shown = [m for m in result.metrics if m.arm == arm and m.task.startswith("positions ")]
            ends = [[int(x) for x in m.task.removeprefix("positions ").split("-")] for m in shown]
            middles = [math.sqrt(first * last) for first, last in ends]
            (line,) = axes.plot(middles, [m.value for m in shown], marker=".", label=f"{label}, {arm}")
            lows = [m.value if m.low is None else m.low for m in shown]
            highs = [m.value if m.high is None else m.high for m in shown]
            axes.fill_between(middles, lows, highs, color=line.get_color(), alpha=0.15, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="position in the context (tokens)", ylabel="loss (nats per token)")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
