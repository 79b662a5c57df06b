"""Loss by position in long texts: does a model predict better the more it has read?

Texts are cut into spans of one length. Each is read in a new context that begins with the end-of-text token.
The positions 1, 2, 3–4, 5–8, … of a span are averaged together. The result also has the perplexity per token,
and per byte and per word, which do not depend on the tokenizer.

With memorizing, the model learns while it reads, and every token is scored before it is learned from; with
the "right answer" it has read the whole span once before, in a context of its own.

Shapes: B batch, T tokens of a span.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise, zip_longest
from pathlib import Path

import torch
from torch import Tensor

from nested_learning.checks import at_least
from nested_learning.data.corpus import bundled_files, split_documents, split_validation, text_files
from nested_learning.data.records import format_of, read_records, read_text
from nested_learning.data.tokenizer import Tokenizer
from nested_learning.eval.arms import Memorize
from nested_learning.eval.evaluation import Evaluation
from nested_learning.eval.loading import Loaded
from nested_learning.eval.reader import TextReader
from nested_learning.eval.results import EvaluationResult, Metric, average
from nested_learning.eval.tokenizers import Ids, encode_long
from nested_learning.log_lines import Row
from nested_learning.report import new_figure

TOTALS = ("tokens", "bytes", "words")


@dataclass(frozen=True, kw_only=True, slots=True)
class LongTexts:
    """Settings of `LongPerplexity`: what to read.

    Args:
        files: .txt (a line that is a form feed ends a document) or .jsonl (field "text"), folders of them, or
            patterns; none = the last part of the bundled texts, which training on them holds out.
        length: tokens of a span.
        max_samples: most spans, taken from all documents in turn; None = all.
        batch_size: spans read together.
        memorize: how the model learns in the adapted arm; None = the baseline only.
    """

    files: tuple[Path, ...] = ()
    length: int = 2048
    max_samples: int | None = 16
    batch_size: int = 1
    memorize: Memorize | None = None

    def __post_init__(self) -> None:
        for name in ("length", "max_samples", "batch_size"):
            at_least(name, getattr(self, name), 1)
        if self.memorize and not self.memorize.adapt.reset and self.batch_size > 1:
            raise ValueError(
                f"batch_size must be 1 where spans begin with what was learned, got {self.batch_size}"
            )


class LongPerplexity(Evaluation[Ids]):
    """Losses of long spans by position, and perplexities.

    Args:
        loaded: the checkpoint.
        settings: what to read.

    Raises:
        FileNotFoundError, ValueError: files that cannot be used, or no document of `settings.length` tokens.
    """

    name = "long_perplexity"
    given: LongTexts

    def __init__(self, loaded: Loaded, settings: LongTexts) -> None:
        documents = read_documents(settings.files, loaded.config.data.valid_fraction)
        super().__init__(loaded, settings, cut_spans(documents, loaded.tokenizer, settings))
        self.at_once = settings.batch_size
        self.reader = TextReader(loaded.model, settings.memorize)

    def score(self, items: Sequence[Ids]) -> list[Row]:
        """For every span its numbers of tokens, bytes and words, and by arm the sums of losses by bin."""
        losses = self.reader.losses(self._tokens(items))
        rows: list[Row] = []
        for i, span in enumerate(items):
            text = self.loaded.tokenizer.decode(span)
            counts = {"tokens": len(span), "bytes": len(text.encode()), "words": len(text.split())}
            rows.append({**counts, **{arm: bin_sums(values[i]) for arm, values in losses.items()}})
        return rows

    def learn(self, item: Ids) -> None:
        """See `Evaluation`."""
        self.reader.learn(self._tokens([item]))

    def metrics(self, rows: Sequence[Row]) -> list[Metric]:
        """Perplexities, and the loss of every bin of positions, by arm."""
        return [metric for arm in self.arms for metric in span_metrics(rows, arm, self.given.length)]

    def draw(self, rows: Sequence[Row], result: EvaluationResult, output: Path) -> None:
        """Loss by position."""
        draw_positions({self.loaded.config.name: result}, output.with_suffix(".png"))

    def _tokens(self, spans: Sequence[Ids]) -> Tensor:
        eos = self.loaded.tokenizer.eos_id
        return torch.tensor([[eos, *span] for span in spans], device=self.loaded.device)


def read_documents(files: Sequence[Path], valid_fraction: float) -> list[str]:
    """Documents of files, or the held-out ends of the bundled texts.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line of a .jsonl file without a text.
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


def cut_spans(documents: Sequence[str], tokenizer: Tokenizer, settings: LongTexts) -> list[tuple[str, Ids]]:
    """Spans of `settings.length` tokens, each with a key: the first of every document, then the second, …

    Raises:
        ValueError: no document has so many tokens.
    """
    size, longest = settings.length, 0
    by_document: list[list[tuple[str, Ids]]] = []
    for number, text in enumerate(documents):
        ids = encode_long(tokenizer, text)
        longest = max(longest, len(ids))
        firsts = range(0, len(ids) - size + 1, size)
        by_document.append([(f"{number}/{first}", ids[first : first + size]) for first in firsts])
    in_turn = [span for span in chain.from_iterable(zip_longest(*by_document)) if span is not None]
    if not in_turn:
        raise ValueError(f"length must be at most the {longest} tokens of the longest document, got {size}")
    return in_turn[: settings.max_samples]


def position_bins(length: int) -> list[tuple[int, int]]:
    """First and last position of the bins 1, 2, 3–4, 5–8, … of a span; the last one may be shorter."""
    edges = [0, *(2**k for k in range((length - 1).bit_length())), length]
    return [(before + 1, last) for before, last in pairwise(edges)]


def bin_sums(losses: Tensor) -> list[float]:
    """Sums of `losses [T]` over the bins of positions."""
    wide = losses.double()
    return [float(wide[first - 1 : last].sum()) for first, last in position_bins(len(losses))]


def span_metrics(rows: Sequence[Row], arm: str, length: int) -> Iterator[Metric]:
    """Perplexities, then the loss of every bin; spans are the samples of the intervals."""
    nats = [sum(row[arm]) for row in rows]
    for unit in TOTALS:
        counts = [row[unit] for row in rows]
        if sum(counts):
            yield perplexity(f"perplexity per {unit.removesuffix('s')}", nats, counts, arm)
    for number, (first, last) in enumerate(position_bins(length)):
        losses = [row[arm][number] / (last - first + 1) for row in rows]
        yield average(f"positions {first}-{last}", "loss", losses, arm=arm)


def perplexity(name: str, nats: Sequence[float], counts: Sequence[int], arm: str) -> Metric:
    """exp(nats / counts), both summed over spans, with the interval of the delta method for a ratio."""
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


def draw_positions(results: dict[str, EvaluationResult], path: Path) -> None:
    """Draw the loss by position of one or several results, with 95 % intervals, as a PNG."""
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
