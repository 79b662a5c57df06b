"""Answers to prompts by greedy generation, by the model as trained and after it has memorized the prompt."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nested_learning.data.tokenizer import Tokenizer, encode_document
from nested_learning.eval.loading import Loaded
from nested_learning.eval.memorize import Memorize
from nested_learning.eval.results import BASELINE

READ_TOKENS = 1024  # read at a time, so that the logits of a long prompt never exist together


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Tokens of a text of any length, without an end."""
    tokens: list[int] = encode_document(tokenizer, text)[:-1].tolist()
    return tokens


@torch.no_grad()
def read(model: Any, tokens: Tensor, state: Any = None) -> tuple[Tensor, Any]:
    """Logits `[B, V]` behind the last of `tokens [B, T]`, and the state there."""
    for part in torch.split(tokens, READ_TOKENS, 1):
        logits, state = model(part, state)
    return logits[:, -1], state


@torch.no_grad()
def generate(model: Any, logits: Tensor, state: Any, max_new_tokens: int, eos_id: int) -> list[int]:
    """The likeliest token again and again, from `logits [1, V]` on: up to `eos_id`, which is left out."""
    tokens: list[int] = []
    for _ in range(max_new_tokens):
        token = int(logits.argmax(-1))
        if token == eos_id:
            break
        tokens.append(token)
        if len(tokens) < max_new_tokens:
            logits, state = model(torch.tensor([[token]], device=logits.device), state)
            logits = logits[:, -1]
    return tokens


class Answerer:
    """Goes on with prompts, in every arm.

    The adapted arm learns while it reads the prompt, and answers from there. With the right answer given, it
    reads prompt and answer and learns, then reads the prompt in a new context and answers.

    Args:
        loaded: the model and its tokenizer.
        memorize: how to learn; None = the baseline only.
        max_new_tokens: of an answer.
    """

    def __init__(self, loaded: Loaded, memorize: Memorize | None, max_new_tokens: int) -> None:
        self.loaded = loaded
        self.memorize = memorize
        self.max_new_tokens = max_new_tokens
        self._carried: Any = None

    @property
    def arms(self) -> list[str]:
        """Names of the arms."""
        return [BASELINE] if self.memorize is None else [BASELINE, self.memorize.arm]

    def answer(self, prompt: str, right: str) -> dict[str, str]:
        """What every arm says. `right` is looked at only with `--memorize-use-correct-answer`."""
        model, tokens = self.loaded.model, self._tokens(prompt)
        said = {BASELINE: self._say(*read(model, tokens))}
        if self.memorize is not None:
            state = self.learn(prompt, right)
            if self.memorize.use_correct_answer:
                logits, state = read(model, tokens, self.memorize.memory(model, state))
            else:
                logits, state = read(model, tokens[:, -1:], state)
            said[self.memorize.arm] = self._say(logits, state)
        return said

    def learn(self, prompt: str, right: str) -> Any:
        """Learn from a sample, and carry that on to the next one with `--memorize-no-reset`.

        Called by `answer`; also the way to catch up with samples whose answers are known.

        Returns:
            The state before the last token of the prompt, or behind the right answer if that is read too.
        """
        assert self.memorize is not None
        gold = self.memorize.use_correct_answer
        tokens = self._tokens(f"{prompt} {right}") if gold else self._tokens(prompt)[:, :-1]
        state = self.memorize.read(self.loaded.model, tokens, self._carried)
        self._carried = self.memorize.carried(self.loaded.model, state)
        return state

    def _tokens(self, text: str) -> Tensor:
        return torch.tensor([encode(self.loaded.tokenizer, text)], device=self.loaded.device)

    def _say(self, logits: Tensor, state: Any) -> str:
        tokenizer = self.loaded.tokenizer
        new = generate(self.loaded.model, logits, state, self.max_new_tokens, tokenizer.eos_id)
        return tokenizer.decode(new)
