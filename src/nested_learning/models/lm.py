"""The language model: embedding, blocks, norm, head. Tokens in, logits out, state in and out."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Unpack, overload

from torch import Tensor, nn
from torch.nn import functional as F

from nested_learning.data.tokenizer import Tokenizer
from nested_learning.layers.checks import check_kind
from nested_learning.layers.cms import CMS
from nested_learning.layers.documents import Documents, locate_documents
from nested_learning.layers.norm import RMSNorm
from nested_learning.models.block import HopeBlock
from nested_learning.models.config import HopeConfig
from nested_learning.models.decode import decoder_of, why_no_decoder
from nested_learning.models.generation import PREFILL, EagerReader, Reader, Rows
from nested_learning.models.sampling import Sampler, SamplerOptions, check_count
from nested_learning.models.text import Continuation, TextStream, continue_texts, prompt_tokens, text_list
from nested_learning.models.tokens import check_range, check_tokens, prompt_rows
from nested_learning.state import LayerState, ModelState

INIT_STD = 0.02


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

    @overload
    def generate(
        self,
        tokens: Tensor,
        max_new_tokens: int,
        temperature: float = ...,
        top_k: int | None = ...,
        top_p: float | None = ...,
        seed: int | None = ...,
        prefill: int = ...,
        *,
        eos: Collection[int] = ...,
        state: ModelState | None = ...,
    ) -> Tensor: ...

    @overload
    def generate(
        self,
        tokens: Sequence[Sequence[int]],
        max_new_tokens: int,
        temperature: float = ...,
        top_k: int | None = ...,
        top_p: float | None = ...,
        seed: int | None = ...,
        prefill: int = ...,
        *,
        eos: Collection[int] = ...,
        state: ModelState | None = ...,
    ) -> list[list[int]]: ...

    def generate(
        self,
        tokens: Tensor | Sequence[Sequence[int]],
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        prefill: int = PREFILL,
        *,
        eos: Collection[int] = (),
        state: ModelState | None = None,
    ) -> Tensor | list[list[int]]:
        """Continue prompts by sampling, one token at a time on a carried state.

        The state of memory mixers does not grow with the context.

        Args:
            tokens: prompts of one length, `[B, T]`, or lists of tokens of any lengths. Every row is read and
                continued as if alone.
            max_new_tokens: of every row; 0 gives the prompts back.
            temperature: 0 takes the likeliest token.
            top_k, top_p: sample only from the k likeliest tokens (all, if there are fewer), or from the
                smallest set of mass p.
            seed: row i is drawn with seed + i; None draws from torch's global generator.
            prefill: tokens of the prompt that are read at a time, at most (rounded down to a multiple of
                `config.alignment`, if it is no less). They bound the memory that a long prompt takes.
            eos: tokens that end a row. With some of them the host waits for every token.
            state: what was read before, a row for each prompt; None = start of a context.

        Returns:
            Of a tensor `[B, T + max_new_tokens]`; a row that has ended repeats the token that ended it. Of
            lists a list of tokens for every row, prompt included, up to and with the token that ended it.

        Raises:
            TypeError: tokens that are no integers.
            ValueError: naming the argument out of range.
        """
        rows = self.rows_of(
            tokens,
            Sampler(
                max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed
            ),
            prefill,
            state,
        )
        for draw in rows.draws():
            if eos:
                for row, token in zip(draw.rows, draw.tokens.tolist(), strict=True):
                    if token in eos:
                        rows.stop(row)
                        rows.tokens[row, rows.place :] = token
        if isinstance(tokens, Tensor):
            return rows.tokens
        return [rows.text(row) for row in range(len(tokens))]

    def rows_of(
        self,
        prompts: Tensor | Sequence[Sequence[int]],
        sampler: Sampler,
        prefill: int = PREFILL,
        state: ModelState | None = None,
    ) -> Rows:
        """The rows of a batch before anything is drawn; the arguments are those of `generate`."""
        check_count("prefill", prefill, 1)
        lengths, whole = prompt_rows(
            prompts, sampler.max_new_tokens, self.config.vocab_size, self.embedding.weight.device
        )
        if state is not None:
            self._layers(state)
        aligned = prefill // self.config.alignment * self.config.alignment  # whole chunks stay whole
        return Rows(self, whole, lengths, sampler, state, aligned or prefill)

    def generate_text(
        self,
        prompts: Sequence[str],
        tokenizer: Tokenizer,
        *,
        stop: Sequence[str] = (),
        state: ModelState | None = None,
        **sampler: Unpack[SamplerOptions],
    ) -> list[str]:
        """Continuations of texts, each as if alone.

        Args:
            tokenizer: of the model. Its token for the end of a text ends a row.
            stop: strings that end a row; they are not part of the result.
            state: what was read before, a row for each prompt.
            sampler: see `Sampler`: `max_new_tokens`, `temperature`, `top_k`, `top_p`, `seed`.

        Raises:
            TypeError: a prompt that is no string.
            ValueError: naming the argument out of range.
        """
        how = Sampler(**sampler)
        tokens = [prompt_tokens(tokenizer, prompt, state is None) for prompt in text_list(prompts)]
        texts = [Continuation(tokenizer, row, stop, how.max_new_tokens) for row in tokens]
        continue_texts(self.rows_of(tokens, how, state=state), texts)
        return [one.text for one in texts]

    def stream(
        self,
        prompt: str,
        tokenizer: Tokenizer,
        *,
        stop: Sequence[str] = (),
        state: ModelState | None = None,
        **sampler: Unpack[SamplerOptions],
    ) -> TextStream:
        """The continuation of a text in pieces, as they come; the arguments are those of `generate_text`.

        Example:
            >>> stream = model.stream("Call me", tokenizer, max_new_tokens=50, temperature=0.8)
            >>> for piece in stream:
            ...     print(piece, end="", flush=True)
            >>> more = model.stream(" And then", tokenizer, state=stream.state())
        """
        how = Sampler(**sampler)
        tokens = prompt_tokens(tokenizer, prompt, state is None)
        text = Continuation(tokenizer, tokens, stop, how.max_new_tokens)
        return TextStream(self.rows_of([tokens], how, state=state), text)

    def reader(self, state: ModelState, example: Tensor) -> Reader:
        """What reads one token `[B, 1]` more at each call, going on from `state`.

        On CUDA it reads in graphs where it can (`models/decode.py`), and the next call may write into the
        same logits. `example`: a token. Called without gradients.
        """
        cycle = self.config.cycle
        if why_no_decoder(self, self.config.mixer, cycle, example.device) is not None:
            return EagerReader(self, state)
        decoder = decoder_of(self, cycle, example)
        decoder.start(state, example)
        return decoder
