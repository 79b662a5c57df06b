"""The language model: embedding, blocks, norm, head. Tokens in, logits out, state in and out."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nested_learning.layers.cms import CMS
from nested_learning.layers.documents import locate_documents
from nested_learning.layers.norm import RMSNorm
from nested_learning.models.block import HopeBlock
from nested_learning.models.config import HopeConfig
from nested_learning.models.sampling import sample_token
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
        """
        return ModelState(tuple(block.init_state(batch, plain) for block in self._blocks()))

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

    def _blocks(self) -> list[HopeBlock]:
        return [block for block in self.blocks if isinstance(block, HopeBlock)]

    def forward(
        self, tokens: Tensor, state: ModelState | None = None, documents: Tensor | None = None
    ) -> tuple[Tensor, ModelState]:
        """`tokens [B, T]` int64 → (`logits [B, T, V]`, state). `state=None` starts a context.

        One call on T tokens, any split of it into calls, and one token at a time give the same logits.

        Args:
            documents: `[B, T]` integers, which document a token belongs to: rows of several documents,
                each read as if alone. They begin at multiples of `config.alignment`. Only without `state`;
                do not go on from the state that comes back: it belongs to several documents.
        """
        self._check(tokens)
        if documents is not None and (state is not None or documents.shape != tokens.shape):
            raise ValueError(
                f"documents must have the shape of tokens, {tuple(tokens.shape)}, and go without a state; "
                f"got {tuple(documents.shape)}"
            )
        apart = None if documents is None else locate_documents(documents, self.config.alignment)
        before = (LayerState(),) * len(self.blocks) if state is None else state.layers
        x = self.embedding(tokens)
        after = []
        for block, layer in zip(self.blocks, before, strict=True):
            x, new = block(x, layer, apart)
            after.append(new)
        weight = self.embedding.weight if self.head is None else self.head.weight
        position = (0 if state is None else state.position) + tokens.shape[1]
        return F.linear(self.norm(x), weight.to(x.dtype)), ModelState(tuple(after), position)

    def _check(self, tokens: Tensor) -> None:
        if tokens.dim() != 2 or tokens.shape[1] == 0:
            raise ValueError(
                f"tokens must be [batch, length] with length of at least 1, got {tuple(tokens.shape)}"
            )
        if tokens.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"tokens must be int64 or int32, got {tokens.dtype}")

    @torch.no_grad()
    def generate(
        self,
        tokens: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
    ) -> Tensor:
        """Continue `tokens [B, T]` by sampling: `[B, T + max_new_tokens]`.

        One token at a time on a carried state, whose size does not grow with the context for memory mixers.

        Args:
            temperature: 0 takes the likeliest token.
            top_k, top_p: sample only from the k likeliest tokens, or from the smallest set of mass p.
            seed: of the sampling; None draws from torch's global generator.
        """
        if max_new_tokens < 0:
            raise ValueError(f"max_new_tokens must not be negative, got {max_new_tokens}")
        generator = None if seed is None else torch.Generator(tokens.device).manual_seed(seed)
        new, state = tokens, None
        for _ in range(max_new_tokens):
            logits, state = self(new, state)
            new = sample_token(logits[:, -1].float(), temperature, top_k, top_p, generator)[:, None]
            tokens = torch.cat([tokens, new], 1)
        return tokens
