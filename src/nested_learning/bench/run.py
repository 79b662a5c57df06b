"""Runs the parts of the benchmark and collects their results."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from nested_learning.bench.flops import BACKWARD, flops_per_token, forward_work
from nested_learning.bench.machine import Floor, MachineRates, describe, floor_seconds, measure_rates
from nested_learning.bench.memory import peak_in_subprocess
from nested_learning.bench.peer import peer_installed
from nested_learning.bench.settings import (
    PEER,
    BenchSettings,
    Case,
    build_model,
    comparison,
    hope_config,
    peer_comparison,
)
from nested_learning.bench.steps import Decoding, forward_pass, training_step
from nested_learning.bench.timing import Progress, Run, Spread, interleave, relative_speed, spread
from nested_learning.models.compile import compile_model
from nested_learning.runtime import keep_freed_memory

StepMaker = Callable[[nn.Module, BenchSettings, int, int], Run]


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One model at one length (or position) in one part of the benchmark.

    Args:
        part: "train", "forward", "decode" or "memory".
        name, mixer, chunk, expansion: the model, see `Case`.
        yardstick: the model it was interleaved with and is compared to.
        length: tokens per sequence; in decoding, tokens read before.
        batch: sequences.
        seconds: one value per round, of a whole step or pass, or of one decoded token of every sequence.
        tokens_per_second: of all sequences together.
        ratio: yardstick's time over the model's in the same round; in "memory", the model's peak over the
            yardstick's. None where the yardstick was not measured.
        growth: in decoding, time over the same model's time at the first position, in the same round.
        peak_bytes: of a training step, in "memory" only.
        parameters: of the model. state_floats: numbers in the state per sequence, at the end.
        flops_per_token: forward pass, counted. floor: seconds that the counted work must take here.
    """

    part: str
    name: str
    mixer: str
    chunk: int
    expansion: float = 1.0
    yardstick: str
    length: int
    batch: int
    seconds: tuple[float, ...] = ()
    tokens_per_second: Spread | None = None
    ratio: Spread | None
    growth: Spread | None = None
    peak_bytes: int | None = None
    parameters: int | None = None
    state_floats: int | None = None
    flops_per_token: float | None = None
    floor: Floor | None = None


def run_benchmark(settings: BenchSettings, progress: Progress) -> dict[str, Any]:
    """Measure what `settings` ask for: a JSON-ready `{"settings", "machine", "rates", "results"}`."""
    keep_freed_memory()
    torch.set_num_threads(settings.threads)
    progress("measuring the machine's rates")
    rates = measure_rates(settings.device, torch.bfloat16 if settings.precision == "bf16" else torch.float32)
    jobs = [(comparison(settings), *shape) for shape in settings.shapes()]
    if settings.peer and peer_installed():
        shape = (settings.batch, settings.peer_length)
        jobs += [(peer_comparison(chunk, settings.peer_expansion), *shape) for chunk in settings.peer_chunks]
    elif settings.peer:
        progress("titans-pytorch is not installed (uv sync --extra bench): that comparison is left out")
    results: list[Measurement] = []
    for cases, batch, length in jobs:
        for part, make in (("train", training_step), ("forward", forward_pass)):
            if part in settings.parts:
                results += _time_steps(settings, part, make, (cases, batch, length), rates, progress)
        if "memory" in settings.parts:
            results += _measure_peaks(settings, (cases, batch, length), progress)
    if "decode" in settings.parts:
        results += _time_decoding(settings, rates, progress)
    return {
        "settings": asdict(settings),
        "machine": describe(settings.device),
        "rates": asdict(rates),
        "results": [asdict(result) for result in results],
    }


def _time_steps(
    settings: BenchSettings,
    part: str,
    make: StepMaker,
    job: tuple[list[Case], int, int],
    rates: MachineRates,
    progress: Progress,
) -> list[Measurement]:
    """All models of a comparison at one length; `job` is (models, batch, length)."""
    cases, batch, length = job
    models = {case.name: build_model(settings, case) for case in cases}
    states = {case.name: _state_floats(models[case.name], settings, case, length) for case in cases}
    if settings.compile:
        for model in models.values():
            compile_model(model)
    runs = {name: make(model, settings, batch, length) for name, model in models.items()}
    warmup = 2 if settings.compile else 1
    label = _labelled(progress, f"{part} T={length} batch={batch}")
    seconds = interleave(runs, settings.repeats, settings.device, label, warmup)
    first = cases[0].name
    factor = 1 + BACKWARD if part == "train" else 1
    return [
        Measurement(
            part=part,
            **asdict(case),
            yardstick=first,
            length=length,
            batch=batch,
            seconds=tuple(seconds[case.name]),
            tokens_per_second=spread([batch * length / s for s in seconds[case.name]]),
            ratio=relative_speed(seconds[first], seconds[case.name]),
            parameters=_parameters(models[case.name]),
            state_floats=states[case.name],
            **_counted(settings, case, batch, length, rates, factor),
        )
        for case in cases
    ]


def _time_decoding(settings: BenchSettings, rates: MachineRates, progress: Progress) -> list[Measurement]:
    """All models at all positions in the same rounds, so that positions can be compared too."""
    label = _labelled(progress, f"decode batch={settings.decode_batch}")
    tokens = settings.decode_tokens or settings.chunk
    cases = {
        (case.name, position): case for position in settings.decode_positions for case in comparison(settings)
    }
    runs: dict[tuple[str, int], Decoding] = {}
    for (name, position), case in cases.items():
        if case.mixer != "attention" or position <= settings.yardstick_max_position:
            label(f"{name} reads {position} tokens")
            runs[name, position] = Decoding(build_model(settings, case), settings, position, tokens)
    timed = interleave(
        {f"{name} at {position}": run for (name, position), run in runs.items()},
        settings.repeats,
        settings.device,
        label,
    )
    seconds = {key: [s / tokens for s in timed[f"{key[0]} at {key[1]}"]] for key in runs}
    return [_decoded(cases[key], run, key[1], seconds, rates) for key, run in runs.items()]


def _decoded(
    case: Case, run: Decoding, position: int, seconds: dict[tuple[str, int], list[float]], rates: MachineRates
) -> Measurement:
    own, batch = seconds[case.name, position], run.settings.decode_batch
    yardstick = comparison(run.settings)[0].name
    other = seconds.get((yardstick, position))
    start = seconds.get((case.name, run.settings.decode_positions[0]))
    parameters, floats = _parameters(run.model), run.state_floats()
    moved = rates.itemsize * (parameters + batch * floats)  # weights and state, read once
    return Measurement(
        part="decode",
        **asdict(case),
        yardstick=yardstick,
        length=position,
        batch=batch,
        seconds=tuple(own),
        tokens_per_second=spread([batch / s for s in own]),
        ratio=None if other is None else relative_speed(other, own),
        growth=None if start is None else relative_speed(own, start),
        parameters=parameters,
        state_floats=floats,
        floor=Floor(0.0, 0.0, moved / rates.copy),
    )


def _measure_peaks(
    settings: BenchSettings, job: tuple[list[Case], int, int], progress: Progress
) -> list[Measurement]:
    cases, batch, length = job
    peaks: dict[str, int] = {}
    for case in cases:
        peaks[case.name] = peak_in_subprocess(settings, case, batch, length)
        progress(f"memory T={length} batch={batch} {case.name}: {peaks[case.name] / 1e6:.0f} MB")
    first = cases[0].name
    return [
        Measurement(
            part="memory",
            **asdict(case),
            yardstick=first,
            length=length,
            batch=batch,
            ratio=spread([peaks[case.name] / max(1, peaks[first])]),
            peak_bytes=peaks[case.name],
        )
        for case in cases
    ]


def _counted(
    settings: BenchSettings, case: Case, batch: int, length: int, rates: MachineRates, factor: int
) -> dict[str, Any]:
    """Counted operations and floors; nothing for the peer, whose products are not counted."""
    if case.mixer == PEER:
        return {}
    config = hope_config(settings, case)
    floor = floor_seconds(forward_work(config, batch, length), rates, factor)
    return {"flops_per_token": flops_per_token(config, length), "floor": floor}


@torch.no_grad()
def _state_floats(model: nn.Module, settings: BenchSettings, case: Case, length: int) -> int | None:
    """Numbers in the state of one sequence after `length` tokens; None for the peer, which returns none."""
    if case.mixer == PEER:
        return None
    tokens = torch.zeros(1, length, dtype=torch.long, device=settings.device)
    return int(model(tokens)[1].numel())


def _parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _labelled(progress: Progress, label: str) -> Progress:
    return lambda message: progress(f"{label}: {message}")
