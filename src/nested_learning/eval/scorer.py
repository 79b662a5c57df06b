"""Log-likelihoods and generated texts of any model called as `logits, state = model(tokens, state)`.

A context that several continuations share is read once, and its state is forked. Rows of a batch end in
padding, which nothing reads afterwards; contexts that are forked or continued together have one length.

    scorer = Scorer(model, tokenizer)
    scorer.loglikelihood([("The capital of France is", " Paris"), ("The capital of France is", " Rome")])

Shapes: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from nested_learning.adapt.memorize import score
from nested_learning.adapt.paths import Adaptable
from nested_learning.checks import at_least, one_of
from nested_learning.data.padding import IGNORE
from nested_learning.data.tokenizer import Tokenizer
from nested_learning.eval.tokenizers import HuggingFaceTokenizer, Ids, PlainTokenizer, TextTokenizer
from nested_learning.models.sampling import sample_token

POLICIES = ("fresh", "carried")
SEGMENT = 512  # tokens per call, so that memory for logits does not grow with the text
Score = tuple[float, bool]
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How a text is continued.

    Args:
        max_new_tokens: the most tokens that are generated.
        until: texts that end the generation; they are not part of the result.
        temperature, top_k, top_p: as in `HopeLM.generate`; by default the likeliest token is taken.
        seed: seed of the sampling.
    """

    max_new_tokens: int = 256
    until: tuple[str, ...] = ()
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0


class Scorer:
    """Scores texts and continues them.

    Args:
        model: see `Adaptable`; on `device`, in evaluation mode. It may have `max_length`, and `end_ids`:
            tokens that end a text besides the tokenizer's.
        tokenizer: of this package, or a `HuggingFaceTokenizer`.
        batch_size: most rows of a call. It changes time and memory, not the numbers.
        policy: "fresh": every request begins in the state `start`. "carried": contexts (and texts of
            `rolling`) are read one after the other, as one stream in the order of the requests; each
            continuation is scored or generated on a fork that is discarded. A context equal to that of the
            previous request is not read again. `reset` begins a new stream.
        max_length: most tokens that a call may read. Longer contexts lose their beginning; longer texts are
            scored in windows. None: the model's own, if it has one and the policy is "fresh"; without a
            maximum a text is read in one pass.
        start: a state of one row in which requests begin, such as a memory; None = an empty context.
        device: device of the model.

    Raises:
        ValueError: an argument that is not allowed.
    """

    def __init__(
        self,
        model: Adaptable,
        tokenizer: Tokenizer | HuggingFaceTokenizer,
        batch_size: int = 8,
        policy: str = "fresh",
        max_length: int | None = None,
        start: Any = None,
        device: torch.device | str = "cpu",
    ) -> None:
        one_of("policy", policy, POLICIES)
        at_least("batch_size", batch_size, 1)
        at_least("max_length", max_length, 1)
        if policy == "carried" and max_length is not None:
            raise ValueError(f"max_length must be None for policy = carried, got {max_length}")
        self.model, self.device = model, device
        self.tokenizer: TextTokenizer = (
            tokenizer if isinstance(tokenizer, HuggingFaceTokenizer) else PlainTokenizer(tokenizer)
        )
        self.batch_size, self.policy, self.start = batch_size, policy, start
        if max_length is None and policy == "fresh":
            max_length = getattr(model, "max_length", None)
        self.max_length: int | None = max_length
        self._ends = {self.tokenizer.eos_id, *getattr(model, "end_ids", ())}
        self.reset()

    def reset(self) -> None:
        """Begin a new stream, for the policy "carried"."""
        self._stream = self.start
        self._last: tuple[Ids, Any] | None = None

    @torch.no_grad()
    def replay(self, pairs: Sequence[tuple[str, str]]) -> None:
        """Let a carried stream read the contexts of requests whose scores are known already."""
        for pair in pairs if self.policy == "carried" else ():
            self._advance(self.encode_pair(*pair)[0])

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[Score]:
        """For every (context, continuation): ln p(continuation | context), and whether each of its tokens is
        the likeliest one."""
        return _in_order(self.loglikelihood_of_ids([self.encode_pair(*pair) for pair in pairs]), len(pairs))

    def encode_pair(self, context: str, continuation: str) -> tuple[Ids, Ids]:
        """Tokens of a context and of its continuation; together they are the tokens of the whole text.

        White space at the end of the context goes to the continuation, as most tokenizers put it before
        words. An empty context becomes the prefix token. This is the rule of lm-eval's `hf` models.
        """
        stripped = context.rstrip()
        continuation = context[len(stripped) :] + continuation
        if context:
            head, whole = self.tokenizer.encode(stripped), self.tokenizer.encode(stripped + continuation)
            if head:
                return head, whole[len(head) :]
        prefix, tail = self.tokenizer.prefix_id, self.tokenizer.encode_plain(continuation)
        return (tail[:1], tail[1:]) if tail[:1] == [prefix] else ([prefix], tail)

    @torch.no_grad()
    def loglikelihood_of_ids(self, pairs: Sequence[tuple[Ids, Ids]]) -> Iterator[tuple[int, Score]]:
        """`loglikelihood` of token ids: yields the number of a request and its score, in any order."""
        pairs = [self._cut(context, continuation) for context, continuation in pairs]
        if self.policy == "carried":
            yield from self._carried(pairs)
            return
        groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for i, (context, _) in enumerate(pairs):
            groups[tuple(context)].append(i)
        alone = [members[0] for members in groups.values() if len(members) == 1]
        rows = {i: _row(*pairs[i]) for i in alone}
        yield from self._score_rows(rows)
        shared = [members for members in groups.values() if len(members) > 1]
        for batch in self._batches_of_groups(shared, pairs):
            heads = [pairs[members[0]][0] for members in batch]
            yield from self._forks(heads, [[(i, pairs[i][1]) for i in members] for members in batch])

    @torch.no_grad()
    def rolling(self, texts: Sequence[str]) -> Iterator[tuple[int, float]]:
        """ln p of whole texts, each token given all before it.

        With `max_length`, a token is given what fits into a window, which moves on when it is full.

        Yields:
            The number of a text and its log-likelihood, in any order.
        """
        documents = [self.tokenizer.encode(text) for text in texts]
        yield from ((i, 0.0) for i, ids in enumerate(documents) if not ids)
        todo = sorted((i for i, ids in enumerate(documents) if ids), key=lambda i: (len(documents[i]), i))
        if self.policy == "carried":
            for i in sorted(todo):
                inputs, targets = _row([self.tokenizer.prefix_id], documents[i])
                (score,), state = self._score([inputs], [targets], self._stream)
                self._stream, self._last = self.read([documents[i][-1:]], state), None
                yield i, score[0]
            return
        for batch in _chunks(todo, self.batch_size):
            windows = [
                (i, *window)
                for i in batch
                for window in rolling_windows(documents[i], self.tokenizer.prefix_id, self.max_length)
            ]
            totals = dict.fromkeys(batch, 0.0)
            rows = {number: (inputs, targets) for number, (_, inputs, targets) in enumerate(windows)}
            for number, (value, _) in self._score_rows(rows):
                totals[windows[number][0]] += value
            yield from totals.items()

    @torch.no_grad()
    def generate(self, contexts: Sequence[str], sampling: Sampling) -> Iterator[tuple[int, str]]:
        """Continue contexts: yields the number of a context and its new text, in any order."""
        ids = [self.tokenizer.encode(text) or [self.tokenizer.prefix_id] for text in contexts]
        if self.max_length is not None:
            room = self.max_length - sampling.max_new_tokens
            if room < 1:
                raise ValueError(
                    f"max_new_tokens must be less than max_length = {self.max_length}, "
                    f"got {sampling.max_new_tokens}"
                )
            ids = [one[-room:] for one in ids]
        if self.policy == "carried":
            for i, one in enumerate(ids):
                before = self._advance(one)
                yield i, self.write([one[-1:]], before, sampling)[0]
            return
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        for _, same in groupby(order, key=lambda i: len(ids[i])):
            for batch in _chunks(list(same), self.batch_size):
                heads = [ids[i] for i in batch]
                state = self.read([one[:-1] for one in heads], self._begin(len(batch)))
                written = self.write([one[-1:] for one in heads], state, sampling)
                yield from zip(batch, written, strict=True)

    def _carried(self, pairs: Sequence[tuple[Ids, Ids]]) -> Iterator[tuple[int, Score]]:
        for _, members in groupby(range(len(pairs)), key=lambda i: pairs[i][0]):
            same = list(members)
            context = pairs[same[0]][0]
            before = self._advance(context)
            rows = [(i, _row(context[-1:], pairs[i][1])) for i in same]
            yield from self._score_forks(rows, [0] * len(rows), before)

    def _advance(self, context: Ids) -> Any:
        """Let the stream read a context unless it just did, and return the state before its last token."""
        if self._last is None or self._last[0] != context:
            before = self.read([context[:-1]], self._stream)
            self._last, self._stream = (context, before), self.read([context[-1:]], before)
        return self._last[1]

    def _batches_of_groups(
        self, groups: list[list[int]], pairs: Sequence[tuple[Ids, Ids]]
    ) -> Iterator[list[list[int]]]:
        """Batches of groups whose contexts have one length, with at most `batch_size` continuations each."""

        def length(members: list[int]) -> int:
            return len(pairs[members[0]][0])

        for _, same in groupby(sorted(groups, key=length), key=length):
            batch: list[list[int]] = []
            for members in same:
                if batch and sum(map(len, batch)) + len(members) > self.batch_size:
                    yield batch
                    batch = []
                batch.append(members)
            yield batch

    def _forks(
        self, contexts: list[Ids], continuations: list[list[tuple[int, Ids]]]
    ) -> Iterator[tuple[int, Score]]:
        """Read contexts of one length up to their last token, and score continuations on forks."""
        state = self.read([context[:-1] for context in contexts], self._begin(len(contexts)))
        rows, parents = [], []
        for parent, (context, members) in enumerate(zip(contexts, continuations, strict=True)):
            rows += [(i, _row(context[-1:], ids)) for i, ids in members]
            parents += [parent] * len(members)
        yield from self._score_forks(rows, parents, state)

    def _score_forks(
        self, rows: list[tuple[int, tuple[Ids, Ids]]], parents: list[int], state: Any
    ) -> Iterator[tuple[int, Score]]:
        """Score rows; row k begins in row `parents[k]` of `state`, or in an empty context if that is None."""
        for batch in _chunks(list(zip(rows, parents, strict=True)), self.batch_size):
            index = torch.tensor([parent for _, parent in batch], device=self.device)
            fork = None if state is None else state.rows(index)
            inputs, targets = zip(*(row for (_, row), _ in batch), strict=True)
            scores, _ = self._score(list(inputs), list(targets), fork)
            yield from zip([i for (i, _), _ in batch], scores, strict=True)

    def _score_rows(self, rows: dict[int, tuple[Ids, Ids]]) -> Iterator[tuple[int, Score]]:
        """Score inputs and targets that begin in `start`, with rows of similar length together."""
        order = sorted(rows, key=lambda i: (len(rows[i][0]), i))
        for batch in _chunks(order, self.batch_size):
            inputs, targets = zip(*(rows[i] for i in batch), strict=True)
            scores, _ = self._score(list(inputs), list(targets), self._begin(len(batch)))
            yield from zip(batch, scores, strict=True)

    def _begin(self, batch: int) -> Any:
        if self.start is None:
            return None
        return self.start.rows(torch.zeros(batch, dtype=torch.long, device=self.device))

    def _score(self, inputs: list[Ids], targets: list[Ids], state: Any) -> tuple[list[Score], Any]:
        """Scores of rows of inputs and targets (IGNORE is not scored), and the state after the longest."""
        if not any(inputs):
            return [(0.0, True)] * len(inputs), state
        x, y = self._pad(inputs, 0), self._pad(targets, IGNORE)
        total = torch.zeros(len(inputs), dtype=torch.float64, device=self.device)
        greedy = torch.ones(len(inputs), dtype=torch.bool, device=self.device)
        for part, wanted in zip(torch.split(x, SEGMENT, 1), torch.split(y, SEGMENT, 1), strict=True):
            logits, state = self.model(part, state)
            row, column = (wanted != IGNORE).nonzero(as_tuple=True)
            chosen, right = logits[row, column], wanted[row, column]
            wide = chosen.float() if chosen.dtype.itemsize < 4 else chosen
            total.index_add_(0, row, -F.cross_entropy(wide, right, reduction="none").double())
            greedy[row[chosen.argmax(-1) != right]] = False
        return list(zip(total.tolist(), greedy.tolist(), strict=True)), state

    @torch.no_grad()
    def read(self, rows: list[Ids], state: Any) -> Any:
        """The state after reading rows of one length, which may be 0, from `state` on."""
        if rows[0]:
            for part in torch.split(self._pad(rows, 0), SEGMENT, 1):
                _, state = self.model(part, state)
        return state

    @torch.no_grad()
    def write(self, last: list[Ids], state: Any, sampling: Sampling) -> list[str]:
        """Continue rows by new text. `state` has read each row up to its last token, which is in `last`."""
        generator = torch.Generator(self.device).manual_seed(sampling.seed)
        until = (*sampling.until, self.tokenizer.decode_all([self.tokenizer.eos_id]))
        tokens, written = self._pad(last, 0), [Ids() for _ in last]
        texts: list[str | None] = [None] * len(last)
        for _ in range(sampling.max_new_tokens):
            logits, state = self.model(tokens, state)
            new = sample_token(
                logits[:, -1].float(), sampling.temperature, sampling.top_k, sampling.top_p, generator
            )
            tokens = new[:, None]
            for row, token in enumerate(new.tolist()):
                written[row].append(token)
                texts[row] = self._ended(written[row], until) if texts[row] is None else texts[row]
            if None not in texts:
                break
        return [
            _before(self.tokenizer.decode(ids), until) if text is None else text
            for text, ids in zip(texts, written, strict=True)
        ]

    def _ended(self, ids: Ids, until: Sequence[str]) -> str | None:
        """The text of `ids` up to its end, which a special token may be; None if it has not ended."""
        ended = ids[-1] in self._ends
        kept = ids[:-1] if ended else ids
        shown = "" if ended else self.tokenizer.decode_all(kept)
        if ended or any(stop and stop in shown for stop in until):
            return _before(self.tokenizer.decode(kept), until)
        return None

    def _cut(self, context: Ids, continuation: Ids) -> tuple[Ids, Ids]:
        """Cut the beginning of a context that is too long for the model."""
        if self.max_length is None:
            return context, continuation
        if len(continuation) > self.max_length:
            raise ValueError(
                f"max_length must be at least the tokens of a continuation, {len(continuation)}, "
                f"got {self.max_length}"
            )
        return context[-(self.max_length + 1 - len(continuation)) :], continuation

    def _pad(self, rows: list[Ids], value: int) -> Tensor:
        longest = max(map(len, rows))
        padded = [row + [value] * (longest - len(row)) for row in rows]
        return torch.tensor(padded, dtype=torch.long, device=self.device)


def read_losses(model: Adaptable, tokens: Tensor, state: Any = None, size: int | None = None) -> Tensor:
    """Losses `[B, T]` in nats of `tokens [B, T+1]`, read in segments, so that few logits exist at a time.

    Args:
        state: where the text begins; None = an empty context.
        size: tokens of a segment; None = `SEGMENT`.
    """
    parts, size = [], size or SEGMENT
    for first in range(0, tokens.shape[1] - 1, size):
        losses, state = score(model, tokens[:, first : first + size + 1], state)
        parts.append(losses)
    return torch.cat(parts, 1)


def rolling_windows(ids: Ids, prefix_id: int, max_length: int | None) -> Iterator[tuple[Ids, Ids]]:
    """Inputs and targets of the windows of a text; every token is a target once.

    The first window begins with the prefix token. Later ones are filled up with tokens that were scored
    before, whose targets are IGNORE. Without a maximum there is one window.
    """
    size = max_length or len(ids)
    whole = [prefix_id, *ids]
    for done in range(0, len(ids), size):
        end = min(done + size, len(ids))
        first = max(0, end - size)
        yield whole[first:end], [IGNORE] * (done - first) + ids[done:end]


def _row(context: Ids, continuation: Ids) -> tuple[Ids, Ids]:
    """Inputs and targets for the score of a continuation."""
    if not continuation:
        return [], []
    return context + continuation[:-1], [IGNORE] * (len(context) - 1) + continuation


def _before(text: str, until: Sequence[str]) -> str:
    """The part of a text before the first of the texts in `until`."""
    return text[: min((at for stop in until if stop and (at := text.find(stop)) >= 0), default=None)]


def _chunks(items: list[T], size: int) -> list[list[T]]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def _in_order(found: Iterator[tuple[int, Score]], count: int) -> list[Score]:
    scores = dict(found)
    return [scores[i] for i in range(count)]
