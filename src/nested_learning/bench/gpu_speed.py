"""Training step, forward pass and decoding of every model, each in the same rounds as the Transformer."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from nested_learning.bench.counts import count_run, write_profile
from nested_learning.bench.flops import BACKWARD, forward_work
from nested_learning.bench.gpu_kernels import distrust, with_kernels
from nested_learning.bench.gpu_record import Budget, Entry, Record
from nested_learning.bench.gpu_settings import (
    PEERS,
    GpuSettings,
    Variant,
    build_variant,
    lacking,
    model_config,
    variants,
    yardstick,
)
from nested_learning.bench.memory import measure_peak
from nested_learning.bench.settings import PEER
from nested_learning.bench.steps import Decoding, forward_pass, precision, random_tokens, training_step
from nested_learning.bench.timing import Progress, Run, interleave, relative_speed, seconds_of
from nested_learning.models.compile import compile_model
from nested_learning.models.lm import HopeLM
from nested_learning.ops import kernels
from nested_learning.train.captured import CapturedForward, CapturedStep
from nested_learning.train.objective import next_token_loss

FIRST_SECONDS = 20.0
"""What a model is thought to take on a card before any of its lengths has been measured."""
RATE = "rate bf16"
TRACED = 100_000
"""Kernels from which on a trace would be too large for a viewer."""


class LostCardError(RuntimeError):
    """The card refuses everything that this process asks of it from now on; another process can go on."""

    exit_status = 3


def check_card(key: str, entry: Entry) -> None:
    """Raise LostCardError if a result says that the card refuses this process from now on."""
    why = entry.get("why", "")
    if "CUDA error" in why or "Triton Error [CUDA]" in why:
        raise LostCardError(f"{key}: {why}")


@dataclass(frozen=True)
class Job:
    """One measurement.

    Args:
        part: "train", "forward" or "decode".
        length: tokens of a sequence; in "decode", tokens before.
        variant: of the model.
    """

    part: str
    length: int
    variant: Variant

    @property
    def key(self) -> str:
        """In the record."""
        return f"{self.part} {self.length} {self.variant.name} ({self.variant.how})"


@dataclass(frozen=True)
class Ready:
    """A model set up for a job.

    Args:
        run: one step, pass, or run of decoding.
        peak_bytes: memory of an eager training step above what was there before; None in other parts.
        parameters: of the model.
    """

    run: Run
    peak_bytes: int | None
    parameters: int


def jobs(settings: GpuSettings, kernel_models: frozenset[str]) -> list[Job]:
    """What is measured, in this order: models at their best, then decoding, then other ways to run them."""
    made: list[Job] = []
    for group in variants(settings, kernel_models):
        made += [
            Job(part, length, variant)
            for length in settings.lengths
            for part in ("train", "forward")
            if part in settings.parts
            for variant in group
        ]
        decoders = dict.fromkeys(decoded(variant) for variant in group if variant.name not in PEERS)
        positions = settings.positions if "decode" in settings.parts else ()
        made += [Job("decode", at, variant) for at in positions for variant in decoders]
    return list(dict.fromkeys(made))


def decoded(variant: Variant) -> Variant:
    """As a model decodes: token by token, as `HopeLM.reader` has it: in graphs of its own, or eagerly where a
    cache grows."""
    return replace(variant, compiled=False, graph=False)


def product_rate(device: str, side: int) -> float:
    """Best rate of several bf16 products of `side × side` matrices, in FLOP/s."""
    a = torch.randn(side, side, device=device).to(torch.bfloat16)
    seconds = [seconds_of(lambda: a @ a, device) for _ in range(6)]
    return 2 * side**3 / min(seconds[1:])


class Speed:
    """Measures jobs into a record. The Transformer of a part and length stays on the device between jobs."""

    def __init__(
        self, settings: GpuSettings, record: Record, budget: Budget, folder: Path, progress: Progress
    ) -> None:
        self.settings, self.record, self.budget = settings, record, budget
        self.folder, self.progress = folder, progress
        self.held: tuple[tuple[str, int], Ready] | None = None

    def run(self) -> None:
        """All jobs that are not in the record yet and for which there is time.

        Raises:
            LostCardError: see there. What was measured is in the record, and so is the job that did it.
        """
        settings = self.settings
        if not self.record.has(RATE):
            rate = product_rate(settings.device, settings.product)
            self.record.put(RATE, "done", flops=rate, side=settings.product)
        for job in jobs(settings, with_kernels(settings)):
            if self.record.has(job.key):
                continue
            entry = self._entry(job)
            self.record.put(job.key, **{**self._about(job), **entry})
            self.progress(f"{job.key}: {entry.get('why') or entry['status']}")
            check_card(job.key, entry)
            release(settings)
        self.held = None

    def _about(self, job: Job) -> Entry:
        decoding = job.part == "decode"
        batch = 1 if decoding else self.settings.batch(job.length)
        tokens = self.settings.decode_tokens if decoding else batch * job.length
        about = {"part": job.part, "length": job.length, "batch": batch, "tokens": tokens}
        return {**about, **asdict(job.variant), "how": job.variant.how}

    def _entry(self, job: Job) -> Entry:
        """The result of a job. What a model raises is its result; the others are measured all the same."""
        if why := lacking(job.variant.name):
            return {"status": "absent", "why": why}
        if job.variant.kernels == "triton" and (why := distrust(job.variant.name, self.record)):
            return {"status": "unchecked", "why": why}
        if not self.budget.fits(self.guess(job)):
            return {"status": "skipped", "why": "no time left"}
        if not self.record.begin(job.key, **self._about(job)):
            return dict(self.record.entries[job.key])
        began = time.perf_counter()
        try:
            with kernels_as(job.variant.kernels):
                entry = self._measure(job)
            return {"status": "done", **entry, "took": time.perf_counter() - began}
        except KeyboardInterrupt:
            self.record.forget(job.key)
            raise
        except Exception as error:  # of any kind: out of memory, a capture that is refused, a compiler's
            words = " ".join(str(error).split())
            self.held = None
            return {"status": "failed", "why": f"{type(error).__name__}: {words[:300]}"}

    def guess(self, job: Job) -> float:
        """Seconds that a job may take: what the same model took at the last length, in proportion."""
        shorter = [
            entry
            for entry in self.record.entries.values()
            if "took" in entry and entry["part"] == job.part
            if (entry["name"], entry["how"]) == (job.variant.name, job.variant.how)
            if entry["length"] < job.length
        ]
        if not shorter:
            return FIRST_SECONDS if self.settings.on_card else 0.0
        last = max(shorter, key=lambda entry: int(entry["length"]))
        return float(last["took"]) * job.length / int(last["length"])

    def _measure(self, job: Job) -> Entry:
        settings, first = self.settings, yardstick(self.settings)
        first = decoded(first) if job.part == "decode" else first
        at = (job.part, job.length)
        if self.held is not None and self.held[0] != at:
            self.held = None
            release(settings)
        if self.held is None:
            self.held = at, prepare(settings, Job(*at, first))
        runs = {"yardstick": self.held[1].run}
        ready = self.held[1] if job.variant == first else prepare(settings, job)
        if job.variant != first:
            runs["own"] = ready.run
        seconds = interleave(runs, settings.repeats, settings.device, lambda message: None)
        own = seconds["own" if "own" in seconds else "yardstick"]
        entry = {
            "seconds": own,
            "ratio": asdict(relative_speed(seconds["yardstick"], own)),
            "peak_bytes": ready.peak_bytes,
            "parameters": ready.parameters,
            "flops": counted_flops(settings, job),
        }
        return entry | self._counted(job, ready.run)

    def _counted(self, job: Job, run: Run) -> Entry:
        """Kernels of a run, and a profile, both where a run is shortest."""
        settings = self.settings
        if job.length != (settings.positions if job.part == "decode" else settings.lengths)[0]:
            return {}
        found, starts = count_run(run, settings.device)
        best = variants(settings, with_kernels(settings))[0]
        if job.part == "train" and job.variant in best and job.variant.name == settings.models[0]:
            write_profile(run, settings.device, self.folder, found < TRACED)
        per = settings.decode_tokens if job.part == "decode" else 1
        return {"kernels_per_step": found / per, "starts_per_step": starts / per}


@contextmanager
def kernels_as(choice: str) -> Iterator[None]:
    """Inside, our kernels where they can run ("triton"), or PyTorch's path."""
    before = kernels.chosen()
    kernels.use_kernels("auto" if choice == "triton" else "torch")
    try:
        yield
    finally:
        kernels.use_kernels(before)


def release(settings: GpuSettings) -> None:
    """Give back the memory of models that are not used any more."""
    gc.collect()
    if settings.on_card:
        torch.cuda.empty_cache()


def prepare(settings: GpuSettings, job: Job) -> Ready:
    """Build a model, compile and capture it as its variant says, and let it run once."""
    if settings.on_card:
        torch._dynamo.reset()  # or the second length would be compiled for all lengths, which is slower
    context = max(settings.lengths) if job.part == "decode" else job.length
    model = build_variant(settings, job.variant.name, context)
    if job.variant.compiled:
        compile_model(model)
    parameters = sum(p.numel() for p in model.parameters())
    make: dict[str, Callable[..., tuple[Run, int | None]]] = {
        "train": _training,
        "forward": _forward,
        "decode": _decoding,
    }
    run, peak = make[job.part](settings, job, model)
    return Ready(run, peak, parameters)


def _training(settings: GpuSettings, job: Job, model: nn.Module) -> tuple[Run, int | None]:
    shared, batch = settings.steps(), settings.batch(job.length)
    plain = training_step(model, shared, batch, job.length)
    plain()  # makes what is made once
    model.zero_grad(set_to_none=True)
    peak = measure_peak(plain, settings.device)
    if not job.variant.graph:
        return plain, peak
    tokens = random_tokens(shared, batch, job.length + 1)
    example = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def loss(inputs: Tensor, targets: Tensor) -> Tensor:
        with precision(shared):
            return next_token_loss(model(inputs)[0], targets)

    model.zero_grad(set_to_none=True)
    release(settings)
    captured = CapturedStep(model, loss, example)
    return lambda: captured(example), peak


def _forward(settings: GpuSettings, job: Job, model: nn.Module) -> tuple[Run, int | None]:
    shared, batch = settings.steps(), settings.batch(job.length)
    if not job.variant.graph:
        return forward_pass(model, shared, batch, job.length), None
    captured = CapturedForward(model)
    return forward_pass(captured, shared, batch, job.length), None


def _decoding(settings: GpuSettings, job: Job, model: nn.Module) -> tuple[Run, int | None]:
    decoding = Decoding(model, settings.steps(), job.length, settings.decode_tokens)
    if settings.on_card and isinstance(model, HopeLM):
        with torch.no_grad(), precision(decoding.settings):
            decoding.one = model.reader(decoding.state, decoding.next[:, :1])
        # twice round its cycle, until all graphs are there
        for _ in range(0, 2 * model.config.alignment, settings.decode_tokens):
            decoding()
    return decoding, None


def counted_flops(settings: GpuSettings, job: Job) -> float | None:
    """Operations of one run of a job, counted; None in decoding and for titans-pytorch."""
    if job.part == "decode" or job.variant.name == PEER:
        return None
    config = model_config(settings, job.variant.name, job.length)
    work = forward_work(config, settings.batch(job.length), job.length)
    factor = 1.0 + BACKWARD if job.part == "train" else 1.0
    return factor * sum(item.flops for item in work)
