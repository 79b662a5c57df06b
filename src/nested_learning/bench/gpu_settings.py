"""What the benchmark on a card measures."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import nn

from nested_learning.bench.peer import PeerLM, peer_installed
from nested_learning.bench.peer_fla import fla_installed, with_fla
from nested_learning.bench.settings import PEER, PRECISIONS, BenchSettings
from nested_learning.checks import at_least, one_of
from nested_learning.config import load_config
from nested_learning.models.config import HopeConfig
from nested_learning.models.lm import HopeLM
from nested_learning.runtime import pick_device

YARDSTICK = "transformer"
ARMS: dict[str, tuple[str, ...]] = {
    YARDSTICK: ("model=transformer", "levels=mlp"),
    "hope": (),
    "self_mod": ("levels=mlp",),
    "titans": ("model.mixer=titans", "levels=mlp"),
    "linear": ("model.mixer=linear", "levels=mlp"),
}
"""Models by name, as overrides of the configuration: `hope` is the configured one."""
FLA = "fla"
PEERS = {PEER: "titans", FLA: "linear"}
"""Models of other packages, each with the arm whose place its memory takes."""
PARTS = ("train", "forward", "decode")
OWN = "own"
"""In the place of "triton" or "torch": the kernels of a peer."""
SMOKE_TRAINING = ("seq_len=192", "batch_size=2", "accumulation=1", "precision=fp32", "eval_batches=2")


@dataclass(kw_only=True, slots=True)
class GpuSettings:
    """One run of the benchmark on a card.

    Args:
        config: an entry of `configs/`, whose model is measured and trained.
        overrides: changes to it, such as `("model.dim=64",)`.
        models: names of `ARMS` and `PEERS`, beside the Transformer.
        parts: of `PARTS`, what is timed.
        lengths: tokens per sequence.
        tokens: per step, at every length; at least one sequence.
        positions: tokens read before decoding is timed. decode_tokens: decoded per timed run.
        repeats: timed rounds.
        compile: whether `compile_model` compiles the repeated parts.
        precision: "bf16" (autocast) or "fp32".
        device: "cuda" or "cpu"; "auto" = CUDA if there is one.
        product: side of the square bf16 product whose rate is the card's.
        count_tokens: length at which operations are counted. count_overrides: the narrow model for it.
        pilot: overrides of both training runs. pilot_probe: steps of the runs that say how long one takes.
        pilot_steps: at most so many.
    """

    config: str = "pilot"
    overrides: tuple[str, ...] = ()
    models: tuple[str, ...] = ("hope", "self_mod", "titans", "linear", FLA, PEER)
    parts: tuple[str, ...] = PARTS
    lengths: tuple[int, ...] = (2048, 8192, 32_768)
    tokens: int = 16_384
    positions: tuple[int, ...] = (100, 2048, 8192, 32_768)
    decode_tokens: int = 64
    repeats: int = 5
    compile: bool = True
    precision: str = "bf16"
    device: str = "auto"
    product: int = 8192
    count_tokens: int = 2048
    count_overrides: tuple[str, ...] = ("model.dim=192", "data.tokenizer.vocab_size=300")
    pilot: tuple[str, ...] = ("train.batch_size=8", "train.accumulation=1")
    pilot_probe: int = 6
    pilot_steps: int = 2000

    def __post_init__(self) -> None:
        device = pick_device(self.device, "bench.device")
        one_of("bench.device", device.type, ("cpu", "cuda"))
        self.device = str(device)
        one_of("bench.precision", self.precision, PRECISIONS)
        for part in self.parts:
            one_of("bench.parts", part, PARTS)
        for model in self.models:
            one_of("bench.models", model, (*ARMS, *PEERS))
        counts = [(name, value) for name in ("lengths", "positions") for value in getattr(self, name)]
        singles = "tokens decode_tokens repeats product count_tokens pilot_probe pilot_steps"
        counts += [(name, getattr(self, name)) for name in singles.split()]
        for name, value in counts:
            at_least(f"bench.{name}", value, 1)
        self.lengths, self.positions = tuple(sorted(self.lengths)), tuple(sorted(self.positions))

    @property
    def on_card(self) -> bool:
        """Whether the device is a CUDA card."""
        return self.device.startswith("cuda")

    def batch(self, length: int) -> int:
        """Sequences of a step."""
        return max(1, self.tokens // length)

    def steps(self) -> BenchSettings:
        """What the parts that are shared with `nl bench speed` read."""
        vocab = model_config(self, YARDSTICK, self.lengths[0]).vocab_size
        return BenchSettings(
            vocab=vocab, device=self.device, precision=self.precision, repeats=self.repeats, decode_batch=1
        )


def smoke_settings() -> GpuSettings:
    """The whole benchmark on tiny models on the CPU, in seconds; its figures mean nothing."""
    narrow = ("model.dim=16", "model.num_layers=1", "model.num_heads=2")
    return GpuSettings(
        overrides=(*narrow, "data.tokenizer.vocab_size=300"),
        models=("hope", "linear"),
        lengths=(64, 192),
        tokens=192,
        positions=(10, 40),
        decode_tokens=3,
        repeats=2,
        compile=False,
        precision="fp32",
        device="cpu",
        product=64,
        count_tokens=192,
        count_overrides=narrow,
        pilot=(*narrow, "data=bytes", *(f"train.{change}" for change in SMOKE_TRAINING)),
        pilot_probe=2,
        pilot_steps=6,
    )


@dataclass(frozen=True)
class Variant:
    """A model and how it is run.

    Args:
        name: of `ARMS` or `PEERS`.
        kernels: "triton" or "torch", or "own" for a peer.
        compiled: its repeated parts by `torch.compile`.
        graph: its step as one CUDA graph.
    """

    name: str
    kernels: str
    compiled: bool
    graph: bool

    @property
    def how(self) -> str:
        """In words, for tables and keys."""
        return ", ".join([self.kernels, *["compiled"] * self.compiled, *["graph"] * self.graph])


def yardstick(settings: GpuSettings) -> Variant:
    """The Transformer: attention in one kernel, the rest compiled, a graph on a card."""
    return Variant(YARDSTICK, "torch", settings.compile, settings.on_card)


def variants(settings: GpuSettings, with_kernels: frozenset[str]) -> tuple[list[Variant], list[Variant]]:
    """What is measured first: every model at its best; and what is measured if there is time: other ways.

    Args:
        settings: of the run.
        with_kernels: names of the models that have Triton kernels on this device.
    """
    graph = settings.on_card
    first, later = [yardstick(settings)], []
    for name in settings.models:
        if name in PEERS:
            first.append(Variant(name, OWN, settings.compile, False))
            later += [Variant(name, OWN, settings.compile, True)] if graph else []
            continue
        ways = [Variant(name, "torch", settings.compile, graph)]
        ways += [Variant(name, "torch", False, graph)] if settings.compile else []
        if name in with_kernels:
            ways.insert(0, Variant(name, "triton", settings.compile, graph))
        first.append(ways[0])
        later += ways[1:]
    return first, later


@cache
def _composed(config: str, overrides: tuple[str, ...]) -> HopeConfig:
    return load_config(config, list(overrides)).model


def model_config(settings: GpuSettings, name: str, length: int, narrow: bool = False) -> HopeConfig:
    """The configuration of a model for sequences of `length` tokens; `narrow`: as operations are counted."""
    arm = ARMS[PEERS.get(name, name)]
    more = settings.count_overrides if narrow else ()
    return _composed(settings.config, (*arm, *settings.overrides, *more, f"train.seq_len={length}"))


def lacking(name: str) -> str | None:
    """Why a model cannot be built here, or None."""
    if name == PEER and not peer_installed():
        return "titans-pytorch is not installed"
    if name == FLA and not fla_installed():
        return "flash-linear-attention is not installed"
    return None


def build_variant(settings: GpuSettings, name: str, length: int) -> nn.Module:
    """A model on its device, from a fixed seed: (tokens, state) → (logits, state)."""
    torch.manual_seed(0)
    config = model_config(settings, name, length)
    if name == PEER:
        return PeerLM(config).to(settings.device)
    model = HopeLM(config)
    if name == FLA:
        with_fla(model)
    return model.to(settings.device)
