"""Answers to prompts: the likeliest tokens, by the model as trained and after it has memorized the prompt."""

from __future__ import annotations

from typing import Any

import torch

from nested_learning.eval.arms import BASELINE, Memorize, Memorizer
from nested_learning.eval.loading import Loaded
from nested_learning.eval.scorer import Sampling, Scorer
from nested_learning.eval.tokenizers import Ids, encode_long


class Answerer:
    """Continues prompts, in every arm.

    The adapted arm learns while it reads the prompt and answers from there. If it is given the right answer,
    it reads and learns prompt and answer, then reads the prompt in a new context and answers.

    Args:
        loaded: the model and its tokenizer.
        memorize: how the model learns; None = the baseline only.
        max_new_tokens: the longest answer.
    """

    def __init__(self, loaded: Loaded, memorize: Memorize | None, max_new_tokens: int) -> None:
        self.loaded = loaded
        self.scorer = Scorer(loaded.model, loaded.tokenizer, device=loaded.device)
        self.memorizer = None if memorize is None else Memorizer(loaded.model, memorize)
        self.sampling = Sampling(max_new_tokens=max_new_tokens)

    def answer(self, prompt: str, right: str) -> dict[str, str]:
        """The answer of every arm. `right` is read only with `--memorize-use-correct-answer`."""
        *head, last = encode_long(self.loaded.tokenizer, prompt)
        said = {BASELINE: self._write(last, self.scorer.read([head], None))}
        if self.memorizer is not None:
            state, how = self.learn(prompt, right), self.memorizer.how
            if how.use_correct_answer:
                state = self.scorer.read([head], self.memorizer.memory(state))
            said[how.arm] = self._write(last, state)
        return said

    def learn(self, prompt: str, right: str) -> Any:
        """Learn from a sample.

        `answer` calls it; it also replays samples whose answers are known.

        Returns:
            The state before the last token of the prompt, or after the right answer if that is read too.
        """
        assert self.memorizer is not None
        gold = self.memorizer.how.use_correct_answer
        text = f"{prompt} {right}" if gold else prompt
        ids = encode_long(self.loaded.tokenizer, text)
        return self.memorizer.read(torch.tensor([ids if gold else ids[:-1]], device=self.loaded.device))

    def _write(self, last: int, state: Any) -> str:
        written: list[Ids] = [[last]]
        return self.scorer.write(written, state, self.sampling)[0]
