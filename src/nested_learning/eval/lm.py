"""Models of this package in EleutherAI's lm-eval, for all of its tasks and its own runner (extra `eval`).

lm_eval.simple_evaluate(model=NestedLM(model, tokenizer), tasks=["lambada_openai"])
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from nested_learning.adapt.paths import Adaptable
from nested_learning.data.tokenizer import Tokenizer
from nested_learning.eval.evaluation import Evaluation
from nested_learning.eval.loading import Loaded
from nested_learning.eval.results import Metric
from nested_learning.eval.samples import samples_path
from nested_learning.eval.scorer import Sampling, Scorer
from nested_learning.eval.tokenizers import HuggingFaceTokenizer
from nested_learning.extras import MissingExtraError
from nested_learning.lock import LOCK, locked
from nested_learning.log_lines import Row
from nested_learning.progress import progress_bar

try:
    from lm_eval.api.model import LM
except ImportError as error:
    raise MissingExtraError("lm-eval (task files of your own, --local-dir, do without)", "lm_eval") from error

T = TypeVar("T")
MAX_NEW_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
DEFAULT_NEW_TOKENS = 256
GENERATION = {*MAX_NEW_TOKENS, "until", "do_sample", "temperature", "top_k", "top_p"}


class NestedLM(LM):  # type: ignore[misc]
    """An `lm_eval.api.model.LM` around a model called as `logits, state = model(tokens, state)`.

    The model may be a `HopeLM`, or a Hugging Face model in `levels_from_pretrained` with a
    `HuggingFaceTokenizer`. All arguments are those of `Scorer`, which does the work.
    """

    def __init__(self, model: Adaptable, tokenizer: Tokenizer | HuggingFaceTokenizer, **scorer: Any) -> None:
        super().__init__()
        self.scorer = Scorer(model, tokenizer, **scorer)
        self._device = torch.device(self.scorer.device)

    @property
    def tokenizer_name(self) -> str:
        """For lm-eval's caches of requests."""
        return self.scorer.tokenizer.fingerprint

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """ln p of continuations, and whether they are greedy, for requests of (context, continuation)."""
        arguments = [request.args for request in requests]
        pairs = [self.scorer.encode_pair(*pair) for pair in arguments]
        found = self.scorer.loglikelihood_of_ids(pairs)
        return self._collect("loglikelihood", arguments, found, disable_tqdm)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """ln p of whole texts, for requests of (text,)."""
        arguments = [request.args for request in requests]
        found = self.scorer.rolling([text for (text,) in arguments])
        return self._collect("loglikelihood_rolling", arguments, found, disable_tqdm)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Generated texts up to one of the texts that end them, for requests of (context, options).

        Raises:
            ValueError: an option that is not in `GENERATION`.
        """
        arguments = [request.args for request in requests]
        wanted = [sampling_of(options) for _, options in arguments]
        found = (
            (members[n], text)
            for kind in dict.fromkeys(wanted)
            for members in [[i for i, one in enumerate(wanted) if one == kind]]
            for n, text in self.scorer.generate([arguments[i][0] for i in members], kind)
        )
        return self._collect("generate_until", arguments, found, disable_tqdm)

    def _collect(
        self, method: str, arguments: list[Any], found: Iterable[tuple[int, T]], disable_tqdm: bool
    ) -> list[T]:
        """Answers in the order of the requests; each is put into lm-eval's cache at once."""
        answers: dict[int, T] = {}
        with progress_bar(total=len(arguments), desc=method, shown=not disable_tqdm) as bar:
            for i, answer in found:
                answers[i] = answer
                self.cache_hook.add_partial(method, arguments[i], answer)
                bar.update()
        return [answers[i] for i in range(len(arguments))]


def sampling_of(options: dict[str, Any]) -> Sampling:
    """How to sample, by lm-eval's options of generation; without `do_sample` the likeliest token is taken."""
    if unknown := options.keys() - GENERATION:
        raise ValueError(
            f"generation option {sorted(unknown)[0]!r} is unknown; allowed: {sorted(GENERATION)}"
        )
    until = options.get("until") or ()
    most = next((options[name] for name in MAX_NEW_TOKENS if options.get(name)), DEFAULT_NEW_TOKENS)
    drawn = bool(options.get("do_sample", options.get("temperature", 0) > 0))
    return Sampling(
        max_new_tokens=int(most),
        until=(until,) if isinstance(until, str) else tuple(until),
        temperature=float(options.get("temperature", 1.0)) if drawn else 0.0,
        top_k=options.get("top_k") or None,
        top_p=options.get("top_p"),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class HarnessSettings:
    """Settings of `Harness`.

    Args:
        tasks: names that lm-eval knows.
        limit: how many documents of each task to take, from the first on; None = all.
        manager: an `lm_eval.tasks.TaskManager` that knows further tasks.
        scorer: arguments of `Scorer`.
        memorize: always None; these tasks have the baseline only.
    """

    tasks: tuple[str, ...]
    limit: int | None = None
    manager: Any = None
    scorer: dict[str, Any] = field(default_factory=dict)
    memorize: None = None


class Harness(Evaluation[None]):
    """Tasks of lm-eval by name, run as its own `simple_evaluate` runs them.

    The log of samples is lm-eval's. An interrupted evaluation is resumed from a cache beside the result,
    which holds every answer of the model.

    Args:
        loaded: the checkpoint.
        settings: which tasks.
    """

    name = "lm-eval"
    given: HarnessSettings
    packages = ("lm-eval",)

    def __init__(self, loaded: Loaded, settings: HarnessSettings) -> None:
        super().__init__(loaded, settings, ())
        self._found: dict[str, Any] = {}

    def settings(self) -> dict[str, Any]:
        """See `Evaluation`; after `rows`, as lm-eval tells the versions of its tasks then."""
        tasks, limit = list(self.given.tasks), self.given.limit
        return {"tasks": tasks, "limit": limit, **self.given.scorer, "task_versions": self._found["versions"]}

    def rows(self, output: Path, fresh: bool) -> list[Row]:
        """What lm-eval logs of every sample, also written beside `output`."""
        self._found = self._run(output, fresh)
        rows = [{"task": task, **row} for task, own in self._found["samples"].items() for row in own]
        lines = [json.dumps(row, default=str) for row in rows]
        samples_path(output).write_text("\n".join([*lines, ""]), encoding="utf-8")
        return rows

    def score(self, items: Sequence[None]) -> list[Row]:
        """Never called: lm-eval scores its own samples."""
        raise NotImplementedError

    def metrics(self, rows: Sequence[Row]) -> list[Metric]:
        """lm-eval's numbers."""
        return list(_metrics(self._found["results"], self._found["n-samples"]))

    def count(self, rows: Sequence[Row]) -> int:
        """Number of documents, each counted once."""
        return sum(count["effective"] for count in self._found["n-samples"].values())

    def _run(self, output: Path, fresh: bool) -> dict[str, Any]:
        """What `simple_evaluate` returns."""
        from lm_eval import simple_evaluate

        loaded, scorer = self.loaded, self.given.scorer
        output.parent.mkdir(parents=True, exist_ok=True)
        identity = json.dumps([loaded.sha256, loaded.tokenizer.fingerprint, scorer], sort_keys=True)
        cache = output.with_suffix(f".{hashlib.sha256(identity.encode()).hexdigest()[:8]}.cache")
        for old in output.parent.glob(f"{cache.name}*") if fresh else ():
            old.unlink()
        model = NestedLM(loaded.model, loaded.tokenizer, device=loaded.device, **scorer)
        with locked(cache.with_name(cache.name + LOCK), f"answers {cache}"):
            found: dict[str, Any] = simple_evaluate(
                model=model,
                tasks=list(self.given.tasks),
                limit=self.given.limit,
                use_cache=str(cache),
                bootstrap_iters=1000,
                task_manager=self.given.manager,
            )
        return found


def _metrics(results: dict[str, dict[str, Any]], counts: dict[str, dict[str, int]]) -> Iterator[Metric]:
    """lm-eval's numbers as metrics: "acc,none" is the value, and "acc_stderr,none" its standard error."""
    for task, values in results.items():
        for key, value in values.items():
            name, _, kind = key.partition(",")
            if not kind or name.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = values.get(f"{name}_stderr,{kind}")
            half = 1.96 * stderr if isinstance(stderr, float) else None
            yield Metric(
                task=task,
                name=name if kind == "none" else f"{name} ({kind})",
                value=float(value),
                low=None if half is None else value - half,
                high=None if half is None else value + half,
                stderr=stderr if half is not None else None,
                n=counts.get(task, {}).get("effective", 1),
            )
