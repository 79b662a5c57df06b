"""What a card should need, by counted operations and bytes: a forecast, made without one.

It takes the kernels as they were meant to be: one of them per chunk, layer and direction, one program for
every sequence, head and memory, the state through memory between chunks. Rates are those of a data sheet, the
shares of them that are reached are assumptions, and both stand below. Nothing of it was measured.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from nested_learning.bench.flops import BACKWARD, Work, forward_work
from nested_learning.models.bill import count_parameters, fast_weight_bill
from nested_learning.models.config import HopeConfig


@dataclass(frozen=True)
class Card:
    """Rates of a card: dense bf16 and tf32 products in FLOP/s, memory in bytes/s; its multiprocessors."""

    name: str
    bf16: float
    tf32: float
    memory: float
    processors: int
    source: str


H100 = Card(
    name="H100 SXM",
    bf16=989e12,
    tf32=494e12,
    memory=3.35e12,
    processors=132,
    source="NVIDIA's data sheet of the H100 SXM5: 989 and 494 TFLOP/s dense, 3.35 TB/s, 132 multiprocessors",
)
DENSE_SHARE = 0.6
"""Of the bf16 rate that large products and fused attention reach (assumed; in favour of the Transformer)."""
SMALL_SHARE = 0.2
"""Of a multiprocessor's tf32 rate that one program reaches with 64 × 64 products that wait for each other
(assumed). It is 0.1 of the bf16 rate, which is what the time comes to that FlashQLA's authors give for
flash-linear-attention's gated delta rule: 3.33 ms forward on an H200 for 32,768 tokens and 64 heads of 128,
which are 0.35 TFLOP as `flops.py` counts."""
PRODUCTS = {"tf32x3": 3, "tf32": 1}
"""tf32 products for one product inside a kernel; three are nearly as exact as fp32."""
GAP = 2e-6
"""Seconds between two kernels of a graph (assumed)."""
PER_CHUNK = 2
"""Kernels per chunk and layer of a training step: one forward, one backward."""
AGAIN = 1
"""Forward passes that the backward kernels of memories run again: each that of its own chunk, in itself."""


@dataclass(frozen=True)
class Forecast:
    """Seconds of one step, by what takes them; they are added up, as if nothing overlapped.

    Args:
        dense: large products and attention, by rate or by bytes, whichever takes longer.
        memories: products inside the kernels of memories, on as many multiprocessors as there are programs.
        state: memories read and written between chunks; of `linear`, all operands of its products.
        starts: gaps between kernels.
    """

    dense: float
    memories: float = 0.0
    state: float = 0.0
    starts: float = 0.0

    @property
    def total(self) -> float:
        """Of all parts."""
        return self.dense + self.memories + self.state + self.starts


def training_forecast(
    config: HopeConfig, batch: int, length: int, rest: int, products: str = "tf32x3", card: Card = H100
) -> Forecast:
    """A training step of `batch` sequences, without the optimizer.

    Args:
        config: a model with ordinary levels only.
        batch: sequences.
        length: tokens of each.
        rest: kernels beside those of the memories; of `linear`, all kernels.
        products: of `PRODUCTS`, inside the kernels.
        card: where.
    """
    work = forward_work(config, batch, length)
    dense = (1 + BACKWARD) * _dense_seconds([item for item in work if not item.batched], card)
    if config.mixer in ("attention", "sliding_attention"):
        return Forecast(dense, starts=rest * GAP)
    on_all = card.tf32 / PRODUCTS[products] * SMALL_SHARE
    small = sum(item.flops for item in work if item.batched)
    if config.mixer == "linear":  # all chunks at once, but for a product per chunk in one kernel
        numbers = sum(item.numbers for item in work if item.batched)
        moved = 4 * (1 + BACKWARD) * numbers / card.memory
        return Forecast(dense, (1 + BACKWARD) * small / on_all, moved, rest * GAP)
    chunks = config.num_layers * -(-length // config.chunk_size)
    small *= 1 + AGAIN + BACKWARD
    programs = batch * config.num_heads * (1 + len(config.memory.adaptive) * (config.mixer == "self_mod"))
    rate = on_all * min(1.0, programs / card.processors)
    moved = 2 * PER_CHUNK * chunks * batch * 4 * state_floats(config)  # each kernel reads and writes it
    return Forecast(dense, small / rate, moved / card.memory, (PER_CHUNK * chunks + rest) * GAP)


def decoding_forecast(
    config: HopeConfig, batch: int, position: int, starts: int, card: Card = H100
) -> Forecast:
    """One token of each of `batch` sequences: weights (fp32, cast by autocast: 8 bytes moved each), the state
    in fp32 (read, and written once in a chunk), or keys and values in bf16.

    Args:
        config: of the model.
        batch: sequences that are decoded together.
        position: tokens before.
        starts: kernels of a token.
        card: where.
    """
    weights = 8 * count_parameters(config) / card.memory
    if config.mixer == "attention":
        held = 2.0 * 2 * batch * position * config.dim * config.num_layers
    else:
        held = 4.0 * batch * config.num_layers * state_floats(config) * (1 + 2 / config.chunk_size)
    return Forecast(weights, state=held / card.memory, starts=starts * GAP)


def state_floats(config: HopeConfig) -> int:
    """Numbers that the mixer of one layer carries for one sequence."""
    return fast_weight_bill(replace(config, num_layers=1))[0].mixer


def _dense_seconds(work: list[Work], card: Card) -> float:
    by_rate = sum(item.flops for item in work) / (DENSE_SHARE * card.bf16)
    by_bytes = 2 * sum(item.numbers for item in work) / card.memory
    return max(by_rate, by_bytes)
