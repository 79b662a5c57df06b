"""Operations of a forward pass, counted product by product from the formulas, not measured.

A product `[m, k] @ [k, n]` is 2·m·k·n floating-point operations, reads m·k + k·n numbers and writes m·n.
Only matrix products count; norms, gates, decays and the depthwise convolution do not. What is counted is what
the algorithm needs, not what an implementation spends: attention is causal (half of the T × T square),
memories with the same keys share one Gram matrix and one inverse, and the inverse of a unit triangular
C × C matrix by halves down to single numbers takes 2·C·(C² − 1) / 3.

Shapes: B batch, H heads, T tokens, C chunk, D model width, d = D / H, h hidden width of a memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nested_learning.layers.mixer import MIXERS
from nested_learning.layers.mlp import swiglu_width
from nested_learning.levels import LevelSpec
from nested_learning.models.config import HopeConfig

BACKWARD = 2  # a product in the forward pass takes two of its size in the backward pass


@dataclass(frozen=True)
class Work:
    """Matrix products of one kind.

    Args:
        name: what they are for.
        flops: floating-point operations.
        numbers: numbers read and written, if every product reads its operands and writes its result once.
        batched: many small products with their own weights, instead of a large one.
    """

    name: str
    flops: float
    numbers: float
    batched: bool = False


def forward_work(config: HopeConfig, batch: int, length: int) -> list[Work]:
    """All products of one forward pass over `batch` sequences of `length` tokens.

    Raises:
        ValueError: for what the formulas do not cover: reads inside the chunk, momentum, retention to the
            initial state.
    """
    _check(config)
    tokens, dim = batch * length, config.dim
    if config.mixer in ("attention", "sliding_attention"):
        mixer = _attention(config, batch, length)
    else:
        mixer = [
            _dense("projections", tokens, dim, 3 * dim),
            _dense("rates", tokens, dim, 2 * config.num_heads),
        ]
        count = {"linear": _linear, "self_mod_linear": _shared_gain}.get(config.mixer, _two_layer)
        mixer += count(config, batch, length)
        mixer.append(_dense("projections", tokens, dim, dim))
    if MIXERS[config.mixer].surroundings(config).output_gate:
        mixer.append(_dense("projections", tokens, dim, dim))
    blocks: list[Work] = []
    for layer in range(config.num_layers):
        blocks += mixer
        for level in config.levels_of(layer):
            if config.level_kind(level) == "fast":
                blocks += _fast_level(config, level, batch, length)
                continue
            hidden = swiglu_width(dim, level.expansion or 8 / 3)
            blocks += [_dense("mlp", tokens, dim, 2 * hidden), _dense("mlp", tokens, hidden, dim)]
    return [*blocks, _dense("head", tokens, dim, config.vocab_size)]


def flops_per_token(config: HopeConfig, length: int) -> float:
    """Operations per token of a forward pass over `length` tokens."""
    return sum(work.flops for work in forward_work(config, 1, length)) / length


def inverse_flops(size: int) -> float:
    """Inverse of a unit triangular matrix by halves: Σ over block sizes c of (C / 2c) pairs of 4·c³."""
    return 2 * size * (size * size - 1) / 3


def _check(config: HopeConfig) -> None:
    memory = config.memory
    if config.mixer in ("self_mod", "self_mod_linear", "titans") and config.read != "chunk":
        raise ValueError(f"the count covers model.read = 'chunk' only, got {config.read!r}")
    if memory.momentum or not memory.delta or (memory.retention and memory.retention_target == "init"):
        raise ValueError(
            "the count covers memories with the delta term, retention to zero and no momentum only"
        )


def _dense(name: str, tokens: int, inputs: int, outputs: int) -> Work:
    numbers = tokens * (inputs + outputs) + inputs * outputs
    return Work(name, 2.0 * tokens * inputs * outputs, numbers)


def _batched(name: str, count: int, m: int, k: int, n: int) -> Work:
    """`count` products `[m, k] @ [k, n]`."""
    return Work(name, 2.0 * count * m * k * n, count * (m * k + k * n + m * n), batched=True)


def _inverse(count: int, size: int) -> Work:
    return Work("inverse", count * inverse_flops(size), 2 * count * size * size, batched=True)


def _chunks(length: int, chunk: int) -> list[tuple[int, int]]:
    """(number, tokens) of the full chunks, and of the unfinished one if there is one."""
    full, rest = divmod(length, chunk)
    return [pair for pair in ((full, chunk), (1, rest)) if pair[0] and pair[1]]


def _attention(config: HopeConfig, batch: int, length: int) -> list[Work]:
    tokens, dim = batch * length, config.dim
    window = config.window if config.mixer == "sliding_attention" else length
    seen = sum(min(t, window) for t in range(1, length + 1))  # pairs of query and key, per head and sequence
    # scores and weighted values; a fused kernel writes no scores
    scores = Work("attention", 4.0 * batch * seen * dim, 4.0 * tokens * dim)
    return [_dense("projections", tokens, dim, 3 * dim), scores, _dense("projections", tokens, dim, dim)]


def _linear(config: HopeConfig, batch: int, length: int) -> list[Work]:
    """The gated delta rule on one d × d matrix per head, read inside the chunk."""
    width, work = config.head_dim, []
    for number, size in _chunks(length, config.chunk_size):
        count = batch * config.num_heads * number
        work += [
            _batched("write", count, size, width, width),  # W₀ k
            _batched("write", count, size, width, size),  # Gram matrix
            _inverse(count, size),
            _batched("write", count, size, size, width),  # its product with the right-hand side
            _batched("write", count, width, size, width),  # the new weights
            _batched("read", count, size, width, width),  # W₀ q
            _batched("read", count, size, width, size),  # similarities q kᵀ
            _batched("read", count, size, size, width),
        ]
    return work


def _shared_gain(config: HopeConfig, batch: int, length: int) -> list[Work]:
    """Linear memories that rewrite themselves through one gain Γ of d × d per head."""
    width, sets, adaptive = config.head_dim, batch * config.num_heads, config.memory.adaptive
    rows = (width if "k" in adaptive else 0) + sum(name in adaptive for name in ("eta", "alpha"))
    outs = [rows, *(width for name in ("v", "q") if name in adaptive)]  # of the initial memories
    work = [_batched("read", sets, length, width, width)]  # M_memory (Γq)
    for number, size in _chunks(length, config.chunk_size):
        count = sets * number
        work.append(_batched("read", count, size, width, width))  # Γq
        for out in filter(None, outs):
            work += [_batched("read", count, size, width, n) for n in (width, out)]  # Γx, M(Γx)
    count = sets * (length // config.chunk_size)
    size = config.chunk_size
    work += [
        _batched("targets", count, size, width, width),  # Γv
        _batched("write", count, size, width, width),  # Γk
        _batched("write", count, size, width, size),  # Gram matrix
        _inverse(count, size),
        _batched("write", count, size, size, width),  # its product with the right-hand side
        _batched("write", count, width, size, width),  # the new gain
    ]
    return work


def _two_layer(config: HopeConfig, batch: int, length: int) -> list[Work]:
    """Two-layer memories: M_memory and, in `self_mod`, the adaptive projections (widths 1 for the rates)."""
    memory, width, sets = config.memory, config.head_dim, batch * config.num_heads
    hidden = memory.hidden or width
    self_mod = config.mixer == "self_mod"
    others = [width if name in ("k", "v", "q") else 1 for name in memory.adaptive] if self_mod else []
    other_chunk = memory.projection_chunk_size or config.chunk_size
    work = []
    for number, size in _chunks(length, min(config.chunk_size, other_chunk)):
        for out in (width, *others):
            work += _answer("read", sets * number, size, (width, hidden, out))
    together = other_chunk == config.chunk_size and memory.projection_steps(other_chunk) == 1
    groups = [(config.chunk_size, [width, *others])] if together else []
    groups = groups or [(config.chunk_size, [width]), (other_chunk, others)]
    for chunk, outs in groups:
        count = sets * (length // chunk)
        targets = outs if self_mod and memory.self_targets else [o for o in outs if o == 1]
        for out in targets:
            work += _answer("targets", count, chunk, (width, hidden, out))
        work += _write(count, chunk, outs, (width, hidden))
    return work


def _answer(name: str, count: int, size: int, widths: tuple[int, int, int]) -> list[Work]:
    """W₁ σ̂(W₂ x) of one memory of widths (d, h, o) for `size` tokens."""
    width, hidden, out = widths
    return [_batched(name, count, size, width, hidden), _batched(name, count, size, hidden, out)]


def _fast_level(config: HopeConfig, level: LevelSpec, batch: int, length: int) -> list[Work]:
    """One memory as wide as the model, whose answers to its keys are those that it gives anyway."""
    assert level.chunk_size is not None
    dim, hidden = config.dim, round(config.dim * (level.expansion or 1))
    projected = level.key == "projected"
    work = [_dense("rates", batch * length, dim, 1)] * ((level.eta is None) + config.memory.retention)
    work += [_dense("values", batch * length, dim, dim)] * (1 + projected)
    for number, size in _chunks(length, level.chunk_size):
        work += _answer("read", batch * number, size, (dim, hidden, dim))
    write = _write(batch * (length // level.chunk_size), level.chunk_size, [dim], (dim, hidden))
    answer = 2 if not projected else 0  # z = W₂k and W₁σ̂(z), after the Gram matrix and its inverse
    return work + write[:2] + write[2 + answer :]


def _write(count: int, size: int, outs: Sequence[int], widths: tuple[int, int]) -> list[Work]:
    """One chunk's write of memories with outputs `outs`: their W₂ share keys, so Gram matrix and inverse."""
    if not outs:
        return []
    width, hidden = widths
    work = [_batched("write", count, size, width, size), _inverse(count, size)]
    for out in outs:
        work += _answer("write", count, size, (width, hidden, out))  # z = W₂k and W₁σ̂(z)
        work += [
            _batched("write", count, size, out, hidden),  # error of z
            _batched("write", count, size, size, hidden),  # W₂: inverse times right-hand side
            _batched("write", count, hidden, size, width),  # new W₂
            _batched("write", count, size, hidden, size),  # Gram matrix of σ̂(z)
            _inverse(count, size),
            _batched("write", count, size, size, out),  # W₁: inverse times right-hand side
            _batched("write", count, out, size, hidden),  # new W₁
        ]
    return work
