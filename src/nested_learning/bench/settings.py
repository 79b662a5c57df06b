"""What a benchmark run measures, and the models it measures."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from nested_learning.layers.config import MemoryConfig
from nested_learning.layers.mixer import MIXERS
from nested_learning.levels import LevelSpec
from nested_learning.models.config import HopeConfig
from nested_learning.models.lm import HopeLM
from nested_learning.runtime import pick_device

PARTS = ("train", "forward", "decode", "memory")
PRECISIONS = ("fp32", "bf16")
PEER = "titans_pytorch"


@dataclass(kw_only=True, slots=True)
class BenchSettings:
    """One run of the benchmark. All models have the same width, heads, layers, MLP and vocabulary.

    Args:
        dim, layers, heads, vocab: size of every model.
        chunk: tokens between two writes of a memory.
        batch: sequences per step.
        lengths: tokens per sequence, each with its own batch or None for `batch`.
        mixers: what is compared with the Transformer.
        parts: what is measured, of train, forward, decode and memory.
        repeats: timed rounds; each round runs every model once.
        optimizer: include an AdamW step in the training step.
        keep_every: `memory.keep_every` of the mixers with memories: None = keep products for the backward
            pass, n = only the memories of every n chunks.
        compile: `torch.compile` attention, MLPs and memory writes (training and forward).
        precision: "fp32", or "bf16" for autocast to bfloat16.
        threads: CPU threads.
        device: "cpu" or "cuda"; "auto" = CUDA if there is one.
        decode_positions: tokens read before decoding is timed.
        decode_batch: sequences decoded together.
        decode_tokens: tokens decoded per timed run; None = `chunk`, so that each run holds one write.
        yardstick_max_position: the Transformer is not timed further (its prefix costs O(position²)).
        peer: compare with `titans_pytorch.NeuralMemory`, if the package is installed.
        peer_length, peer_chunks: that comparison's sequence length and chunk sizes.
        peer_expansion: hidden width over head width of the memories in it. The `titans` mixer's own is 1,
            the package's is 4; other than 1 compares both at that width, and `titans` at its own as well.
    """

    dim: int = 256
    layers: int = 4
    heads: int = 4
    vocab: int = 512
    chunk: int = 64
    batch: int = 4
    lengths: tuple[tuple[int, int | None], ...] = ((1024, None), (4096, None), (16_384, 1))
    mixers: tuple[str, ...] = ("self_mod", "titans", "linear")
    parts: tuple[str, ...] = PARTS
    repeats: int = 5
    optimizer: bool = False
    keep_every: int | None = None
    compile: bool = False
    precision: str = "fp32"
    threads: int = 2
    device: str = "cpu"
    decode_positions: tuple[int, ...] = (100, 1000, 16_384, 100_000)
    decode_batch: int = 1
    decode_tokens: int | None = None
    yardstick_max_position: int = 16_384
    peer: bool = True
    peer_length: int = 1024
    peer_chunks: tuple[int, ...] = (64, 16)
    peer_expansion: float = 1.0

    def __post_init__(self) -> None:
        self.lengths = tuple((int(length), batch) for length, batch in self.lengths)
        for name in ("mixers", "parts", "decode_positions", "peer_chunks"):
            setattr(self, name, tuple(getattr(self, name)))
        device = pick_device(self.device, "bench.device")
        _one_of("device", (device.type,), ("cpu", "cuda"))  # others could not be waited for
        self.device = str(device)
        _one_of("mixers", self.mixers, tuple(MIXERS))
        _one_of("parts", self.parts, PARTS)
        _one_of("precision", (self.precision,), PRECISIONS)
        counts = [("lengths", value) for pair in self.lengths for value in pair if value is not None]
        counts += [("decode_positions", value) for value in self.decode_positions]
        counts += [("peer_chunks", value) for value in self.peer_chunks]
        for name in ("chunk", "batch", "repeats", "threads", "decode_batch", "peer_length"):
            counts.append((name, getattr(self, name)))
        for name, value in counts:
            if value < 1:
                raise ValueError(f"bench.{name} must be at least 1, got {value}")

    def shapes(self) -> list[tuple[int, int]]:
        """(batch, length) of every length."""
        return [(batch or self.batch, length) for length, batch in self.lengths]


def smoke_settings() -> BenchSettings:
    """The whole benchmark on tiny models, in seconds: shows that it works; its figures mean nothing."""
    return BenchSettings(
        dim=32,
        layers=1,
        heads=2,
        vocab=32,
        chunk=8,
        batch=2,
        lengths=((32, None),),
        mixers=("self_mod",),
        repeats=2,
        threads=1,
        decode_positions=(10, 50),
        yardstick_max_position=10,
        peer_length=32,
        peer_chunks=(8,),
    )


@dataclass(frozen=True)
class Case:
    """One model of a comparison.

    Args:
        name: in reports.
        mixer: a mixer of the library, or "titans_pytorch".
        chunk: tokens between two writes.
        expansion: hidden width of a memory over the width of its head.
    """

    name: str
    mixer: str
    chunk: int
    expansion: float = 1.0


def comparison(settings: BenchSettings) -> list[Case]:
    """The Transformer first, then the chosen mixers."""
    mixers = [Case(name, name, settings.chunk) for name in settings.mixers]
    return [Case("transformer", "attention", settings.chunk), *mixers]


def peer_comparison(chunk: int, expansion: float = 1.0) -> list[Case]:
    """titans-pytorch first, then the library's `titans` mixer, at one chunk size and hidden width."""
    cases = []
    for mixer, factor in ((PEER, expansion), ("titans", expansion), ("titans", 1.0)):
        name = f"{mixer.replace('_', '-')}, chunk {chunk}, hidden × {factor:g}"
        cases.append(Case(name, mixer, chunk, factor))
    return list(dict.fromkeys(cases))


def hope_config(settings: BenchSettings, case: Case) -> HopeConfig:
    """The configuration of a case, with one plain MLP per block. The peer's is that of `titans`."""
    hidden = round(case.expansion * settings.dim / settings.heads)
    config = HopeConfig(
        vocab_size=settings.vocab,
        dim=settings.dim,
        num_layers=settings.layers,
        num_heads=settings.heads,
        levels=(LevelSpec(),),
        chunk_size=case.chunk,
        memory=MemoryConfig(hidden=hidden, keep_every=settings.keep_every),
    )
    return config.with_mixer("titans" if case.mixer == PEER else case.mixer)


def build_model(settings: BenchSettings, case: Case) -> nn.Module:
    """The model of a case, on its device, from a fixed seed: (tokens, state) → (logits, state)."""
    torch.manual_seed(0)
    if case.mixer == PEER:
        from nested_learning.bench.peer import PeerLM

        return PeerLM(hope_config(settings, case)).to(settings.device)
    return HopeLM(hope_config(settings, case)).to(settings.device)


def _one_of(name: str, values: tuple[str, ...], allowed: tuple[str, ...]) -> None:
    for value in values:
        if value not in allowed:
            raise ValueError(f"bench.{name} must be of {', '.join(allowed)}, got {value!r}")
