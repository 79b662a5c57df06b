"""The language model: embedding, blocks, norm, head. Tokens in, logits out, state in and out."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nested_learning.layers.checks import check_kind
from nested_learning.layers.cms import CMS
from nested_learning.layers.documents import Documents, locate_documents
from nested_learning.layers.norm import RMSNorm
from nested_learning.models.block import HopeBlock
from nested_learning.models.config import HopeConfig
from nested_learning.models.decode import decoder_of, why_no_decoder
from nested_learning.models.sampling import check_count, check_sampling, sample_token
from nested_learning.models.tokens import check_prompt, check_range, check_tokens
from nested_learning.state import LayerState, ModelState

log = logging.getLogger(__name__)
INIT_STD = 0.02
PREFILL = 2048
"""Tokens of a prompt that are read at a time."""


class HopeLM(nn.Module):
    """A HOPE language model (or one of its baselines, by `config.mixer` and `config.levels`).

    Example:
        >>> model = HopeLM(HopeConfig(vocab_size=257, dim=64, num_layers=2))
        >>> logits, state = model(torch.randint(257, (1, 100)))      # read a context
        >>> logits, state = model(torch.randint(257, (1, 1)), state)  # go on from there
    """

    def __init__(self, config: HopeConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(HopeBlock(config, layer) for layer in range(config.num_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.head = None if config.tie_embeddings else nn.Linear(config.dim, config.vocab_size, bias=False)
        self._initialise()

    def _initialise(self) -> None:
        """Logits of unit variance at the start; small matrices, narrower where they write to the residual."""
        nn.init.normal_(self.embedding.weight, std=1 / math.sqrt(self.config.dim))
        narrow = INIT_STD / math.sqrt(2 * self.config.num_layers)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                writes = name.endswith((".out", ".w_out"))
                nn.init.normal_(module.weight, std=narrow if writes else INIT_STD)

    def init_state(self, batch: int, plain: bool = False) -> ModelState:
        """State at the start of a context: the meta-learned initial memories, one set per row.

        `plain` makes the ordinary MLPs fast weights of each sequence too (see `adapt`).

        Raises:
            ValueError: a batch below 1.
        """
        check_count("batch", batch, 1)
        return ModelState(tuple(block.init_state(batch, plain) for block in self.blocks))  # type: ignore[operator]

    def slow_parameters(self) -> dict[str, list[str]]:
        """Names of the parameters of every slow level, over all blocks; the norm before it is one of them.

        They are names of `named_parameters`, also when blocks are wrapped.
        """
        slow: dict[str, list[str]] = {}
        for path, module in self.named_modules():
            if isinstance(module, CMS):
                for name, own in module.slow_parameters().items():
                    slow.setdefault(name, []).extend(f"{path}.{parameter}" for parameter in own)
        return slow

    def forward(
        self, tokens: Tensor, state: ModelState | None = None, documents: Tensor | None = None
    ) -> tuple[Tensor, ModelState]:
        """`tokens [B, T]` int64 → (`logits [B, T, V]`, state). `state=None` starts a context.

        One call on T tokens, any split of it into calls, and one token at a time give the same logits.

        Args:
            documents: `[B, T]` integers, which document a token belongs to: rows of several documents,
                each read as if alone. A document is a run of equal numbers: a number that comes back is
                that of another one. They begin at multiples of `config.alignment`. Only without `state`,
                and the state that comes back cannot be continued: it belongs to several documents.

        Raises:
            TypeError: tokens that are no integers.
            ValueError: another shape, a token outside of the vocabulary (on the CPU; on CUDA the lookup
                asserts), documents that do not fit, or a state of another model, batch, type or device.
        """
        check_tokens(tokens)
        apart = self._locate(documents, tokens, state)
        before = (LayerState(),) * len(self.blocks) if state is None else self._layers(state)
        x = self._embed(tokens)
        after = []
        for block, layer in zip(self.blocks, before, strict=True):
            x, new = block(x, layer, apart)
            after.append(new)
        weight = self.embedding.weight if self.head is None else self.head.weight
        position = (0 if state is None else state.position) + tokens.shape[1]
        return F.linear(self.norm(x), weight.to(x.dtype)), ModelState(
            tuple(after), position, apart is not None
        )

    def _locate(self, documents: Tensor | None, tokens: Tensor, state: ModelState | None) -> Documents | None:
        if documents is None:
            return None
        apart = locate_documents(documents, self.config.alignment)
        if state is not None or documents.shape != tokens.shape:
            raise ValueError(
                f"documents must have the shape of tokens, {tuple(tokens.shape)}, and go without a state; "
                f"got {tuple(documents.shape)}"
            )
        return apart

    def _layers(self, state: ModelState) -> tuple[LayerState, ...]:
        """States of the blocks; each of them checks its own."""
        check_kind(state, ModelState, "HopeLM")
        if state.packed:
            raise ValueError("state belongs to rows of several documents, which cannot be continued")
        if len(state.layers) != len(self.blocks):
            raise ValueError(f"state must be of {len(self.blocks)} blocks, got {len(state.layers)}")
        return state.layers

    def _embed(self, tokens: Tensor) -> Tensor:
        try:
            x: Tensor = self.embedding(tokens)
        except IndexError:  # on the CPU; on CUDA the lookup asserts, and a check would make the host wait
            check_range(tokens, self.config.vocab_size)
            raise
        return x

    @torch.no_grad()
    def generate(
        self,
        tokens: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        prefill: int = PREFILL,
    ) -> Tensor:
        """Continue `tokens [B, T]` by sampling: `[B, T + max_new_tokens]`.

        One token at a time on a carried state, whose size does not grow with the context for memory mixers.

        Args:
            max_new_tokens: 0 gives the prompt back.
            temperature: 0 takes the likeliest token.
            top_k, top_p: sample only from the k likeliest tokens (all, if there are fewer), or from the
                smallest set of mass p.
            seed: of the sampling; None draws from torch's global generator.
            prefill: tokens of the prompt that are read at a time, at most (rounded down to a multiple of
                `config.alignment`, if it is no less). They bound the memory that a long prompt takes.

        Raises:
            TypeError: tokens that are no tensor of integers.
            ValueError: naming the argument out of range.
        """
        check_prompt(tokens, self.config.vocab_size)
        check_sampling(max_new_tokens, temperature, top_k, top_p, seed)
        check_count("prefill", prefill, 1)
        generator = None if seed is None else torch.Generator(tokens.device).manual_seed(seed)
        count = tokens.shape[1]
        state: ModelState | None = None
        spare = tokens.new_zeros(len(tokens), max_new_tokens, dtype=torch.int64)
        whole = torch.cat([tokens, spare], 1)
        if not max_new_tokens:
            return whole
        aligned = prefill // self.config.alignment * self.config.alignment  # whole chunks stay whole
        for part in torch.split(tokens, aligned or prefill, 1):
            logits, state = self(part, state)
        assert state is not None
        read = self.reader(state, tokens[:, -1:])
        del state  # its memory is free as soon as the reader has a newer one
        for place in range(count, count + max_new_tokens):
            whole[:, place] = sample_token(logits[:, -1].float(), temperature, top_k, top_p, generator)
            if place + 1 < count + max_new_tokens:
                logits = read(whole[:, place : place + 1])
        return whole

    def reader(self, state: ModelState, example: Tensor) -> Callable[[Tensor], Tensor]:
        """A function from one token more `[B, 1]` to the logits after it `[B, 1, V]`, going on from `state`.

        On CUDA it reads in graphs where it can (`models/decode.py`), and the next call may write into the
        same logits. `example`: a token. Called without gradients.
        """
        cycle = self.config.cycle
        reason = why_no_decoder(self, self.config.mixer, cycle, example.device)
        if reason is None:
            decoder = decoder_of(self, cycle, example)
            decoder.start(state, example)
            return decoder
        log.debug("no CUDA graphs: %s", reason)

        def read(token: Tensor) -> Tensor:
            nonlocal state
            logits: Tensor
            logits, state = self(token, state)
            return logits

        return read
