"""The public bar: bits per byte of HOPE and of two yardsticks, trained at one size on the same bytes.

The best public HOPE language model reports `BAR` bits per byte: 30.6 M parameters, 0.3 B bytes of
FineWeb-Edu, one seed, no weights. Here HOPE, a Transformer and a gated delta net of equal parameters read the
same bytes in the same order, several seeds each. Every run is one of the trainer and resumes from its
checkpoints; what it leaves is in `byte_card`.

Learning rates are chosen by pilots: runs on a tenth of the bytes with a seed of their own. Every byte is read
once, so their training loss is one on unseen text, and the held-out part has no say in the choice.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing import current_process, parent_process
from pathlib import Path
from shutil import rmtree

import torch

from nested_learning.config import load_config
from nested_learning.data.config import DataConfig, MixtureConfig, SourceConfig
from nested_learning.data.corpus import BUNDLED
from nested_learning.data.files import COMPRESSIONS, find_files
from nested_learning.data.pipeline.process import ProcessingJob, process_mixture
from nested_learning.data.pipeline.sources import ENDINGS
from nested_learning.data.tokenizer import ByteTokenizer
from nested_learning.models.config import HopeConfig
from nested_learning.report import interval, mean, show
from nested_learning.reproduce.byte_card import finish_run, training_record
from nested_learning.reproduce.contenders import CONTENDERS, same_size, state_size
from nested_learning.reproduce.experiment import Experiment, Options, Outcome, Plan, output_folder, positive
from nested_learning.reproduce.report import Plot, Report
from nested_learning.reproduce.runner import Result, Run, Tick
from nested_learning.runtime import pick_device
from nested_learning.train.config import RunConfig, TrainConfig
from nested_learning.train.launch import launch
from nested_learning.train.plain_loop import used_device
from nested_learning.train.plan import Hardware, count_blocks, count_parameters, make_plan, optimizer_numbers

NAME = "byte-bar"
BAR = 1.721
MODELS = ("hope", "transformer", "gated_delta")
BYTES = 300_000_000
PARAMETERS = 30_500_000  # widths of MLPs come in steps: no model has more than the 30.6 M of the bar
SMALLEST = 0.001  # of the size of the models: their embeddings alone would be more
WINDOWS = 2048  # of the evaluation, 4 MB
PILOT, PILOT_SEED = 0.1, 1000
VALIDATIONS = 10  # of a run, each with a checkpoint
WARMUP = 20  # the part of a run that warms up, one in so many
H100 = Hardware(gpus=1, memory_gb=80, peak_tflops=989, mfu=0.2, sharded=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class ByteRun:
    """One run of the trainer.

    Args:
        config: the whole run; the device is chosen where it runs.
        label: of the model.
        windows: most windows of the evaluation; 0 = a pilot, of which only the training loss is wanted.
    """

    config: RunConfig
    label: str
    windows: int

    @property
    def steps(self) -> int:
        """Updates."""
        return self.config.train.steps

    def run(self, tick: Tick) -> Result:
        """Train, or go on from the last checkpoint, then evaluate and write the files beside the weights.

        The trainer shows its own progress, so all steps are ticked at the end.

        Raises:
            KeyboardInterrupt: a signal has stopped the training, which is saved.
        """
        train = replace(self.config.train, device=own_device())
        config = replace(self.config, train=train)
        torch.compiler.reset()  # each code is compiled for a few models only, then it stays eager
        if launch(config).interrupted:
            raise KeyboardInterrupt
        tick(self.steps)
        if not self.windows:
            return training_record(config)
        return finish_run(config, self.label, self.windows)


def own_device() -> str:
    """The device of this process; of several at a time each has a GPU of its own, in turn by its number."""
    device = used_device()
    if device.type != "cuda" or device.index is not None or parent_process() is None:
        return str(device)
    number = int(current_process().name.rpartition("-")[2])
    return f"cuda:{(number - 1) % torch.cuda.device_count()}"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Models, seeds, size, rates and text."""
    add = parser.add_argument
    add("--models", nargs="+", choices=list(CONTENDERS), default=list(MODELS))
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--scale", type=share, default=1.0, help="share of the bytes, and of the parameters, in (0, 1]")
    add("--lrs", type=float, nargs="+", default=[5e-4, 1e-3, 2e-3], help="one = no pilots")
    text = "files, folders or patterns of .txt, .jsonl or .parquet, or the word bundled"
    add("--text", nargs="+", help=f"{text} (default: FineWeb-Edu of the hub)")
    micro = "micro-batches of a step: more need less memory, the gradient is the same"
    add("--accumulation", type=positive, default=2, help=micro)
    add("--workers", type=int, default=2, help="processes that prepare the text; 0 = none")


def share(text: str) -> float:
    """A number in (0, 1], for argparse."""
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be in (0, 1], got {value:g}")
    return value


def contestants(options: Options) -> dict[str, RunConfig]:
    """A run of every model over all bytes, with the seed and the learning rate of the entry `byte_bar`."""
    base = load_config("byte_bar")
    size = max(options.scale, SMALLEST)
    train = replace(shorter_rows(base.train, options.scale), accumulation=options.accumulation)
    train.output_dir = str(output_folder(NAME, options) / "runs")
    if pick_device(options.device, "--device").type != "cuda":
        train.precision = "fp32"
    model = smaller(base.model, size)
    data = data_of(options, base.data)
    found = {}
    for name in options.models:
        sized = same_size(CONTENDERS[name].build(model), round(PARAMETERS * size))
        sized = replace(sized, seq_len=train.seq_len)
        found[name] = with_length(replace(base, model=sized, data=data, train=train), options.scale)
    return found


def shorter_rows(train: TrainConfig, scale: float) -> TrainConfig:
    """Shorter rows by the root of the scale, and as much less of what is not training."""
    root = math.sqrt(scale)
    return replace(
        train,
        seq_len=256 * max(1, round(train.seq_len * root / 256)),
        eval_batches=max(1, round((train.eval_batches or 1) * root)),
        sample_tokens=round(train.sample_tokens * root),
        keep_last=1,
    )


def smaller(model: HopeConfig, scale: float) -> HopeConfig:
    """A model of about `scale` times the parameters: narrower by the square root, and a little shallower."""
    dim = 16 * max(1, round(model.dim * math.sqrt(scale) / 16))
    heads = max(n for n in range(1, model.num_heads + 1) if dim % n == 0 and dim // n >= min(dim, 64))
    layers = max(2, round(model.num_layers * scale**0.25))
    return replace(model, dim=dim, num_heads=heads, num_layers=layers)


def with_length(config: RunConfig, scale: float) -> RunConfig:
    """The run over `scale` times `BYTES`: its steps, warm-up and intervals."""
    train = config.train
    steps = max(1, round(BYTES * scale / (train.batch_size * train.seq_len)))
    every = max(1, -(-steps // VALIDATIONS))
    log_every = max(1, min(train.log_every, steps // 20))
    changed = replace(train, steps=steps, eval_every=every, save_every=every, log_every=log_every)
    optim = replace(config.optim, warmup_steps=max(1, steps // WARMUP))
    return replace(config, train=changed, optim=optim)


def data_of(options: Options, data: DataConfig) -> DataConfig:
    """The text of the runs: as configured, with fewer records at a smaller scale, or that of `--text`."""
    mixture = data.mixture
    assert mixture is not None
    if options.text is None:
        scaled = f"{data.shards}{'' if options.scale == 1 else f'_{options.scale:g}'}"
        sources = tuple(
            replace(source, limit=max(1000, math.ceil((source.limit or 0) * options.scale)))
            for source in mixture.sources
        )
        return replace(data, shards=scaled, mixture=replace(mixture, sources=sources))
    sources = tuple(source for number, path in enumerate(options.text) for source in local(path, number))
    shards = str(output_folder(NAME, options) / "shards")
    near = options.text != [BUNDLED]  # that text is known to hold none
    dedup = replace(mixture.dedup, near=near)
    return replace(
        data, shards=shards, mixture=replace(mixture, sources=sources, dedup=dedup, valid_share=0.05)
    )


def local(path: str, number: int) -> list[SourceConfig]:
    """The sources in a file, folder or pattern: one for every format that it holds, weighted by size.

    Raises:
        FileNotFoundError: there is none.
    """
    if path == BUNDLED:
        return [SourceConfig(name=f"{BUNDLED}{number}", kind="text", path=BUNDLED)]
    found = []
    for kind, endings in ENDINGS.items():
        every = tuple(ending + compression for ending in endings for compression in COMPRESSIONS)
        files = [file for file in find_files(path, every).files if file.name.lower().endswith(every)]
        if files:
            size = float(sum(file.stat().st_size for file in files))
            found.append(SourceConfig(name=f"{kind}{number}", kind=kind, path=path, weight=size))
    if not found:
        raise FileNotFoundError(f"--text {path}: no .txt, .jsonl or .parquet file there")
    return found


def begin(options: Options) -> None:
    """Say what the runs will cost, and make the shards that they read."""
    runs = contestants(options)
    folder = output_folder(NAME, options)
    if options.fresh and (folder / "runs").is_dir():
        rmtree(folder / "runs")
    if options.scale == 1:
        print("\n".join(forecast(name, config) for name, config in runs.items()))
    data = next(iter(runs.values())).data
    prepare(data, options.workers)


def prepare(data: DataConfig, workers: int) -> None:
    """Make the shards; nothing if they are complete."""
    assert data.mixture is not None and data.shards is not None
    job = ProcessingJob(
        mixture=data.mixture, tokenizer=ByteTokenizer(), folder=Path(data.shards), workers=workers
    )
    process_mixture(job)


def forecast(name: str, config: RunConfig) -> str:
    """What one run would take on an H100, counted and not measured."""
    plan = make_plan(config, count_blocks(config), optimizer_numbers(config), H100)
    return (
        f"{name}: {count_parameters(config):,} parameters, {config.train.steps} steps; forecast for one H100 "
        f"at {H100.mfu:.0%} of its peak (counted, not measured): {24 * plan.days:.2f} hours, "
        f"{plan.memory / 2**30:.0f} GiB"
    )


def plan(options: Options) -> dict[str, list[Run]]:
    """The pilots, a row per model and learning rate; with one learning rate the runs themselves."""
    if len(options.lrs) == 1:
        return final_runs(options, dict.fromkeys(options.models, options.lrs[0]))
    return {
        pilot_row(name, lr): [pilot(name, with_length(config, options.scale * PILOT), lr)]
        for name, config in contestants(options).items()
        for lr in options.lrs
    }


def pilot_row(name: str, lr: float) -> str:
    """The name of a pilot's row."""
    return f"{name} pilot {lr:g}"


def pilot(name: str, config: RunConfig, lr: float) -> ByteRun:
    """A short run at one learning rate. It samples no text and validates only because the trainer does."""
    train = replace(config.train, eval_batches=1, sample_tokens=0)
    return named_run(name, replace(config, train=train), lr, PILOT_SEED, windows=0)


def named_run(name: str, config: RunConfig, lr: float, seed: int, windows: int) -> ByteRun:
    """A run in a folder of its own: named by what may differ between runs of one output folder."""
    folder = f"{name}-{config.train.steps}steps-lr{lr:g}-seed{seed}"
    whole = replace(config, name=folder, seed=seed, optim=replace(config.optim, lr=lr))
    return ByteRun(config=whole, label=CONTENDERS[name].label, windows=windows)


def final_runs(options: Options, rates: Mapping[str, float]) -> dict[str, list[Run]]:
    """A row per model, a run per seed."""
    windows = max(64, round(WINDOWS * options.scale))
    return {
        name: [named_run(name, config, rates[name], seed, windows) for seed in options.seeds]
        for name, config in contestants(options).items()
    }


def chosen(options: Options, outcome: Outcome) -> Plan:
    """The runs at the learning rate of each model's best pilot."""
    if len(options.lrs) == 1:
        return {}
    return final_runs(options, {name: best_rate(name, options.lrs, outcome) for name in options.models})


def best_rate(name: str, rates: Sequence[float], outcome: Outcome) -> float:
    """The learning rate with the lowest training loss at the end of its pilot."""
    return min(rates, key=lambda lr: pilot_loss(name, lr, outcome))


def pilot_loss(name: str, lr: float, outcome: Outcome) -> float:
    """Nats per byte."""
    [(_, result)] = outcome[pilot_row(name, lr)]
    return float(result["loss"])


def report(options: Options, outcome: Outcome) -> Report:
    """Bits per byte by seed, mean and interval over seeds, and the difference to the Transformer."""
    header = ["model", "parameters", "state", "learning rate", *(f"seed {seed}" for seed in options.seeds)]
    header += ["bits per byte", "minus Transformer", "seconds a run"]
    rows, numbers = [], []
    for name in options.models:
        cells = outcome[name]
        results = [result for _, result in cells]
        bits, config = [result["bits_per_byte"] for result in results], cells[0][0].config
        less = differences(bits, name, outcome)
        seconds = mean([result["seconds"] for result in results])
        state = state_size(config.model, config.train.seq_len)
        rate, parameters = config.optim.lr, results[0]["parameters"]
        shown = [*map(show, bits), interval(bits), interval(less, "+.4f") if less else "-"]
        sizes = [f"{parameters:,}", f"{state:,}", f"{rate:g}"]
        rows.append([CONTENDERS[name].label, *sizes, *shown, show(seconds, 0)])
        row = {"model": name, "parameters": parameters, "state": state, "lr": rate, "seeds": options.seeds}
        runs = [{key: value for key, value in result.items() if key != "curve"} for result in results]
        numbers.append({**row, "bits_per_byte": bits, "minus_transformer": less, "runs": runs})
    return Report(
        title="The public bar: bits per byte",
        header=header,
        rows=rows,
        numbers=numbers + pilots(options, outcome),
        notes=notes(options, outcome),
        plot=Plot(lines=curves(options, outcome), xlabel="bytes read", ylabel="validation, bits per byte"),
    )


def differences(bits: list[float], name: str, outcome: Outcome) -> list[float]:
    """Bits per byte less those of the Transformer with the same seed: the same bytes in the same order."""
    if name == "transformer" or "transformer" not in outcome:
        return []
    theirs = [result["bits_per_byte"] for _, result in outcome["transformer"]]
    return [own - other for own, other in zip(bits, theirs, strict=True)]


def pilots(options: Options, outcome: Outcome) -> list[dict[str, object]]:
    """The pilots, for the file of numbers."""
    if len(options.lrs) == 1:
        return []
    return [
        {"model": name, "pilot": True, "lr": lr, **outcome[pilot_row(name, lr)][0][1]}
        for name in options.models
        for lr in options.lrs
    ]


def notes(options: Options, outcome: Outcome) -> list[str]:
    """What was trained on what, and what the numbers are."""
    results = [result for name in options.models for _, result in outcome[name]]
    config: RunConfig = outcome[options.models[0]][0][0].config
    train, model = config.train, config.model
    read = train.steps * train.batch_size * train.seq_len
    said = [
        f"{read:,} bytes (ends of documents included) of {describe(config.data.mixture)}, read "
        f"{read / results[0]['train_tokens']:.2f} times; {train.steps} steps of {train.batch_size} x "
        f"{train.seq_len}, {train.precision}; width {model.dim}, {model.num_layers} layers, "
        f"{model.num_heads} heads. With one seed all models read the same bytes in the same order.",
        f"Bits per byte after the last step, on {results[0]['windows']} windows of {train.seq_len} tokens "
        "from held-out documents, each from a fresh state; ends of documents are paid for. SHA-256 of what "
        f"was read: {named(result['sha256'][:16] for result in results)}. Behind ± is half the 95 % "
        "interval over seeds (Student's t).",
        "Seconds of training, without validation and saving, on "
        f"{named(result['hardware'] for result in results)}; commit "
        f"{named(result['git'][:12] for result in results)}.",
    ]
    if len(options.lrs) > 1:
        said.append(said_of_pilots(options, outcome))
    return [*said, said_of_bar(options)]


def named(values: Iterable[str]) -> str:
    """What different values there are."""
    return ", ".join(sorted(set(values)))


def is_whole(options: Options) -> bool:
    """Whether the runs are of the size and the text of the public bar."""
    return options.scale == 1 and options.text is None


def said_of_bar(options: Options) -> str:
    """What the public bar says of these numbers."""
    if is_whole(options):
        return f"The public bar is {BAR} bits per byte, on held-out bytes that are not published."
    return f"Not to be compared with the public bar ({BAR}): another size or other text."


def describe(mixture: MixtureConfig | None) -> str:
    """The sources of a mixture in words."""
    assert mixture is not None
    return ", ".join(
        source.path + (f" (first {source.limit:,} records)" if source.limit else "")
        for source in mixture.sources
    )


def said_of_pilots(options: Options, outcome: Outcome) -> str:
    """How the learning rates were chosen, and which of them lie at an edge."""
    parts, edges = [], []
    for name in options.models:
        losses = ", ".join(f"{lr:g}: {pilot_loss(name, lr, outcome):.4f}" for lr in options.lrs)
        parts.append(f"{name} {losses}")
        if best_rate(name, options.lrs, outcome) in (min(options.lrs), max(options.lrs)):
            edges.append(name)
    return (
        f"Learning rates by the training loss (nats per byte) at the end of pilots on {PILOT:.0%} of the "
        f"bytes, seed {PILOT_SEED}: {'; '.join(parts)}. Best at an edge of the grid: "
        f"{', '.join(edges) or 'none'}."
    )


def curves(options: Options, outcome: Outcome) -> list[tuple[str, list[tuple[float, float | None]]]]:
    """The validations of every run, and the public bar where it can be compared."""
    lines = [
        (CONTENDERS[name].label, [(tokens, bits) for tokens, bits in result["curve"]])
        for name in options.models
        for _, result in outcome[name]
    ]
    if is_whole(options):
        lines.append(("best public HOPE", [(0.0, BAR), (float(BYTES), BAR)]))
    return lines


EXPERIMENT = Experiment(
    name=NAME,
    compiles=False,
    help="bits per byte of HOPE, a Transformer and a gated delta net on 0.3 B bytes: hours of a GPU",
    add_options=add_options,
    quick={"scale": 1e-4, "seeds": [0], "lrs": [1e-3], "text": [BUNDLED], "workers": 0},
    begin=begin,
    device="auto",
    plan=plan,
    report=report,
    follow_ups=(chosen,),
)
