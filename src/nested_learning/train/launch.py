"""From a configuration to a finished run: all parts are built here, in one order."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
from omegaconf import OmegaConf
from torch import nn

from nested_learning.data.corpus import Corpus, load_corpus
from nested_learning.data.tokenizer import Tokenizer
from nested_learning.lock import LOCK, locked
from nested_learning.models.bill import fast_weight_bill
from nested_learning.models.lm import HopeLM
from nested_learning.ops.kernels import kernels
from nested_learning.runtime import keep_freed_memory, set_seed
from nested_learning.train.checkpoint import (
    CheckpointStore,
    find_checkpoint,
    load_checkpoint,
)
from nested_learning.train.compiling import describe_steps, settle
from nested_learning.train.config import RunConfig, run_config
from nested_learning.train.memory import check_memory
from nested_learning.train.origin import Origin, find_origin
from nested_learning.train.plots import plot_losses
from nested_learning.train.starts import record_start
from nested_learning.train.strategy import Strategy, build_strategy
from nested_learning.train.summary import summary
from nested_learning.train.trainer import Trainer, TrainResult
from nested_learning.train.trial import describe_trial, fit_trial, names_no_data, with_sample


def launch(config: RunConfig, strategy: str = "single") -> TrainResult:
    """Train as `config` says and report.

    Writes to `config.run_dir`: `config.yaml`, `starts.jsonl`, `metrics.jsonl`, `checkpoints/`, `loss.png` and
    `sample.txt`.

    Args:
        config: the run.
        strategy: "single", "ddp", "fsdp" or "deepspeed"; the last three in every process of `torchrun`.

    Raises:
        CheckpointError: `train.resume` names or finds a checkpoint that does not belong to this run, or
            `train.init_from` one that cannot be used.
        InUseError: another process writes to the run directory.
        NonFiniteError: see `Trainer.fit`.
        ValueError: see `build_strategy`, `check_memory`, `find_origin`, `settle`, `why_no_graph` and
            `hold_run_dir`.
    """
    keep_freed_memory()
    origin = find_origin(config.to_dict())
    if origin is not None:
        config = run_config(origin.adopt(config.to_dict()))
    chosen = build_strategy(strategy, config)
    try:
        return run(config, chosen, origin)
    finally:
        chosen.close()


def run(config: RunConfig, strategy: Strategy, origin: Origin | None = None) -> TrainResult:
    """Train as `config` says, in the processes of `strategy`; see `launch`."""
    say: Callable[[str], None] = print if strategy.is_main else _silent
    if config.train.resume not in (None, "auto"):
        find_checkpoint(config.train.resume)
    own = None if origin is None else origin.tokenizer
    trial = names_no_data(config.data)
    if trial:
        for prepare in (with_sample, partial(fit_trial, strategy=strategy)):
            config, line = prepare(config)
            say(line)
    with strategy.local_main_first():
        corpus = load_corpus(config.data, say, own)
    check_vocabulary(config, corpus.tokenizer)
    if trial:
        say(describe_trial(config, len(corpus.train)))
    config = settle(config, strategy.device)
    check_memory(config, strategy)
    with ExitStack() as held:
        strategy.on_main(lambda: hold_run_dir(config.run_dir, held))
        return run_in_folder(config, corpus, strategy, say, origin)


def run_in_folder(
    config: RunConfig,
    corpus: Corpus,
    strategy: Strategy,
    say: Callable[[str], None],
    origin: Origin | None = None,
) -> TrainResult:
    """Train in a run directory that no other process uses. Its content stays until all parts are built."""
    set_seed(config.seed)  # after the data, so that a cached corpus changes nothing; before the model
    resume = strategy.on_main(lambda: find_resume(config))
    start = origin if resume is None else None
    model = build_model(config, strategy.device, start)
    lines = describe(config, model, corpus, strategy)
    trainer = Trainer(config, model, corpus, strategy, resume)
    strategy.on_main(lambda: begin(config, trainer.store, resume))
    strategy.on_main(lambda: record_start(config.run_dir, trainer.step, strategy, resume is not None))
    say(lines)
    say(describe_steps(config, strategy.device, trainer.eager, trainer.ungraphed))
    if trainer.unwatched:
        say(f"no report of what levels do: {trainer.unwatched}")
    anew = f"starting with the weights, model and tokenizer of {start.path}" if start else "starting anew"
    say(f"resumed from {resume} at step {trainer.step}" if resume else anew)
    with kernels(config.train.kernels):
        result = trainer.fit()
    if strategy.is_main:
        finish(config, sample_model(config, model, strategy), corpus, result)
    return result


def hold_run_dir(folder: Path, held: ExitStack) -> None:
    """Make the run directory and keep other processes out of it until `held` is closed.

    When `held` is closed, the directory is removed if it is empty because the run could not begin, together
    with the parent folders that were made here.

    Raises:
        InUseError: another process is in it.
        ValueError: it cannot be made or written to.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    held.callback(remove_empty, [folder / "checkpoints", *made])
    try:
        held.enter_context(locked(folder / LOCK, f"run directory {folder}"))
    except OSError as error:
        raise ValueError(
            f"run directory {folder} (train.output_dir/name) cannot be written to: "
            f"{error.strerror}: {error.filename}"
        ) from error


def remove_empty(folders: Sequence[Path]) -> None:
    """Remove those of `folders` that exist and are empty, in this order."""
    for folder in folders:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def sample_model(config: RunConfig, model: HopeLM, strategy: Strategy) -> HopeLM:
    """The model that writes the sample: the trained one, or one loaded from the checkpoint if parameters are
    sharded."""
    if strategy.shards_parameters and config.train.sample_tokens:
        return load_checkpoint(config.run_dir)[0]
    return model


def check_vocabulary(config: RunConfig, tokenizer: Tokenizer) -> None:
    """Raise ValueError if the vocabularies of the model and the tokenizer differ in size."""
    if config.model.vocab_size != tokenizer.vocab_size:
        raise ValueError(
            f"model.vocab_size is {config.model.vocab_size} but the tokenizer has {tokenizer.vocab_size} "
            "tokens; leave model.vocab_size out and set data.tokenizer.vocab_size"
        )


def build_model(config: RunConfig, device: torch.device, origin: Origin | None = None) -> HopeLM:
    """The model of a run on `device`, with its activations checkpointed if the configuration says so.

    Raises:
        CheckpointError: the weights of `origin`, which it begins with, cannot be read or are not finite.
    """
    model = HopeLM(config.model)
    if origin is not None:
        origin.put_weights(model)
    if config.parallel.activation_checkpointing:
        checkpoint_blocks(model)
    return model.to(device)


def checkpoint_blocks(model: HopeLM) -> None:
    """Make every block store only its inputs and recompute the rest in the backward pass.

    Nothing in a block is random, and states of generators cannot be read in a CUDA graph.
    """
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    for i, block in enumerate(model.blocks):
        model.blocks[i] = checkpoint_wrapper(block, preserve_rng_state=False)


def find_resume(config: RunConfig) -> Path | None:
    """The checkpoint to resume from; None = start from the beginning."""
    store = CheckpointStore(config.run_dir / "checkpoints", config.train.keep_last)
    store.clean()
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) and store.folders():
        return store.newest_whole()  # a restart by torchrun: the run that was asked for has already begun
    if config.train.resume is None:
        return None
    return store.newest_whole() if config.train.resume == "auto" else find_checkpoint(config.train.resume)


def begin(config: RunConfig, store: CheckpointStore, resume: Path | None) -> None:
    """Replace what the run directory held. By now the settings of the run are known to work."""
    if resume is None and config.train.resume is None:
        store.clear()
    OmegaConf.save(OmegaConf.create(config.to_dict()), config.run_dir / "config.yaml")


def describe(config: RunConfig, model: nn.Module, corpus: Corpus, strategy: Strategy) -> str:
    """A description of the run in a few lines."""
    train, levels = config.train, config.model.levels
    parameters = sum(p.numel() for p in model.parameters())
    periods = [f"{level.name} ({level.chunk_size})" if level.chunk_size else level.name for level in levels]
    floats = sum(sum(bill.levels.values()) for bill in fast_weight_bill(config.model))
    lines = [
        f"run {config.name} in {config.run_dir.resolve()}",
        f"model: {parameters / 1e6:.2f} M parameters, mixer {config.model.mixer}, "
        f"levels {', '.join(periods)}",
        f"data: {len(corpus.train):,} training and {len(corpus.valid):,} validation tokens, "
        f"vocabulary {corpus.tokenizer.vocab_size}",
        f"training: {train.steps} steps of {train.batch_size} x {train.seq_len} tokens "
        f"on {strategy.world_size} x {strategy.device.type} ({strategy.name}), {train.precision}",
    ]
    if floats:
        rows = train.batch_size // train.accumulation // strategy.world_size
        size = floats * rows * 4 / 2**20
        lines.append(f"fast levels: {floats:,} floats per sequence, {size:.0f} MiB per micro-batch")
    return "\n".join(lines)


def finish(config: RunConfig, model: HopeLM, corpus: Corpus, result: TrainResult) -> None:
    """Plot, report and write a sample of text."""
    folder = config.run_dir
    try:
        plot_losses(folder / "metrics.jsonl", folder / "loss.png", corpus.unigram_entropy)
    except Exception as error:  # of any kind, from the plotting library or a full disk; the run is saved
        print(f"no plot: {type(error).__name__}: {error}", file=sys.stderr)
    if result.interrupted:
        print(f"interrupted and saved at step {result.step}; run the same command to continue")
        print(summary(config, result))
        return
    if result.valid_loss is not None and result.bits_per_byte is not None:
        unigram_bits = corpus.unigram_entropy / math.log(2) / corpus.bytes_per_token
        print(
            f"step {result.step}: validation loss {result.valid_loss:.4f} nats/token "
            f"(unigram entropy {corpus.unigram_entropy:.4f}), "
            f"{result.bits_per_byte:.4f} bits/byte (unigram {unigram_bits:.4f})"
        )
    if config.train.sample_tokens:
        text = write_sample(config, model, corpus.tokenizer)
        print(f"sample: {text}")
        try:
            (folder / "sample.txt").write_text(text, encoding="utf-8")
        except OSError as error:
            print(f"no sample.txt: {error}", file=sys.stderr)
    print(f"results in {folder.resolve()}")
    print(summary(config, result))


def write_sample(config: RunConfig, model: HopeLM, tokenizer: Tokenizer) -> str:
    """`train.sample_tokens` tokens of text after `train.sample_prompt`, drawn with the run's seed."""
    prompt = tokenizer.encode(config.train.sample_prompt) or [tokenizer.eos_id]
    tokens = torch.tensor([prompt], device=next(model.parameters()).device)
    model.eval()
    with torch.compiler.set_stance("force_eager"), kernels("torch"):  # for growing caches, single tokens
        written = model.generate(
            tokens, config.train.sample_tokens, temperature=0.8, top_k=40, seed=config.seed
        )
    return tokenizer.decode(written[0].tolist())


def _silent(line: str) -> None:
    """Ranks other than the main one print nothing."""
