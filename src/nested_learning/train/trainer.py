"""The training loop. `train.launch` builds its parts and starts it.

Shapes: a batch is tokens `[B, T+1]` int64; inputs and targets by `split_batch`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from nested_learning.data.corpus import Corpus
from nested_learning.data.loader import TokenLoader, sequential_batches, split_batch
from nested_learning.data.packing import split_documents
from nested_learning.models.compile import compile_model
from nested_learning.models.config import HopeConfig
from nested_learning.models.lm import HopeLM
from nested_learning.optim.build import build_optimizer, lr_at
from nested_learning.train.captured import MicroSteps
from nested_learning.train.checkpoint import CheckpointStore
from nested_learning.train.checkpointer import Checkpointer, Training
from nested_learning.train.compiling import settle, timed_first_call, why_eager, why_no_graph
from nested_learning.train.config import RunConfig
from nested_learning.train.guard import NonFiniteError, UpdateGuard, find_nonfinite, first_nonfinite
from nested_learning.train.level_report import LevelEffect, LevelWatch, why_no_report
from nested_learning.train.metrics import build_writer, memory_gib
from nested_learning.train.objective import count_targets, next_token_loss
from nested_learning.train.online import online_loss
from nested_learning.train.progress import Clock, Progress, StopSignals
from nested_learning.train.strategy import Strategy


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainResult:
    """The result of a run.

    Args:
        step: number of updates made.
        valid_loss: nats per token; None before the first validation.
        bits_per_byte: the same loss in bits per byte of text.
        interrupted: whether a signal stopped the run, so that it can be resumed.
        run_dir: its directory.
        tokens, seconds: read by this start of the run, and the time it took, with validation and saving.
    """

    step: int
    valid_loss: float | None
    bits_per_byte: float | None
    interrupted: bool
    run_dir: Path
    tokens: int = field(default=0, compare=False)
    seconds: float = field(default=0.0, compare=False)


class Trainer:
    """Trains `model` on `corpus` as `config` says.

    Args:
        config: the run; `config.run_dir` must exist. What it leaves to the device is settled here.
        model: `logits, state = model(tokens)`, on its device. The run's seed must have been set before
            it was built.
        corpus: token arrays, tokenizer and statistics.
        strategy: the processes and devices of the run.
        resume: the checkpoint to resume from.
    """

    def __init__(
        self,
        config: RunConfig,
        model: nn.Module,
        corpus: Corpus,
        strategy: Strategy,
        resume: Path | None = None,
    ) -> None:
        config = settle(config, strategy.device)
        self.config, self.model, self.corpus, self.strategy = config, model, corpus, strategy
        train = config.train
        if train.inner == "online" and strategy.shards_parameters:
            raise ValueError(
                "train.inner = online needs whole parameters on every rank, which "
                f"{strategy.name} does not keep: train with train.py or train_dist.py"
            )
        self.device = strategy.device
        slow = slow_levels(config.model, model)
        self.wrapped, self.optimizer = strategy.prepare(
            model, partial(build_optimizer, config.optim, slow=slow)
        )
        self.loader = TokenLoader(
            corpus.train,
            train.seq_len,
            train.batch_size // strategy.world_size,
            config.seed,
            rank=strategy.rank,
            world_size=strategy.world_size,
            options=config.data.loader,
            block=config.model.alignment,
            pin_memory=self.device.type == "cuda",
        )
        saved = Training(
            config=config,
            model=model,
            optimizer=self.optimizer,
            loader=self.loader,
            tokenizer=corpus.tokenizer,
            text=corpus.fingerprint,
        )
        self.store = CheckpointStore(config.run_dir / "checkpoints", train.keep_last)
        self.checkpoints = Checkpointer(self.store, saved, strategy, config.parallel.async_save)
        self.step = self.saved_step = 0
        self.validated: dict[str, float] = {}
        self.unwatched = why_no_report(config, model, strategy)
        watched = model if self.unwatched is None and isinstance(model, HopeLM) else None
        self.watch = None if watched is None else LevelWatch(watched)
        if resume is not None:
            self.step, self.validated = self.checkpoints.load(resume)
            self.saved_step = self.step
            if watched is not None and train.init_from is not None:
                self.watch = LevelWatch(watched)  # where that run started is not known here
        self.eager = why_eager(config, self.device, strategy.name)
        if self.eager is None:
            compile_model(self.wrapped)
        self.ungraphed = why_no_graph(config, self.device, strategy.name)
        self.graphs = None if self.ungraphed else MicroSteps(model, self._micro_step, self._tell)
        self.guard = UpdateGuard(self.optimizer, self.device)
        self.first_step = self.step
        self.clock, self.began = Clock(self.step), time.monotonic()
        self.recent: dict[int, Tensor] = {}  # batches since the guard was last read
        self.signals = StopSignals(strategy.world_size == 1)
        self.progress = Progress(train.steps, self.step, shown=False)

    def fit(self) -> TrainResult:
        """Train to the last step, or until SIGINT, SIGTERM or SIGHUP; either way the last step is saved.

        A validation that a signal interrupts is not recorded; a resumed run makes it.

        Raises:
            NonFiniteError: a loss, a gradient, or a tensor to be saved is not finite. Nothing is saved, and
                the last checkpoint stays as it is. After a bad loss or gradient no update is made.
            OSError: the metrics cannot be written.
        """
        train = self.config.train
        self.writer = build_writer(self.config, self.step, self.strategy.is_main)
        self.clock, self.began = Clock(self.step), time.monotonic()  # set-up is not training time
        shown = self.config.logging.progress and self.strategy.is_main
        self.progress = progress = Progress(train.steps, self.step, shown)
        update = self.update
        if self.eager is None:
            update = timed_first_call(update, self._tell)
        try:
            with self.signals, self.strategy.watched():
                if self._lacks_validation():
                    progress.print(self._validate())
                    self.saved_step = -1  # so that its checkpoint is written again with the result
                    if self._due(train.save_every):
                        self.save()
                while self.step < train.steps and not self._stopping():
                    loss, norm = update(next(self.loader))
                    progress.reach(self.step)
                    if self._due(train.log_every) or self.step == 1:
                        progress.show(self._log(loss, norm))
                    if self._due(train.eval_every):
                        progress.print(self._validate())
                    if self._due(train.save_every):
                        self.save()
                self.save()
                self.checkpoints.wait()
                return self._result(self.step < train.steps or self._lacks_validation())
        finally:
            progress.close()
            self.writer.close()

    def _tell(self, line: str) -> None:
        """Print a line above the progress bar, in the main process."""
        if self.strategy.is_main:
            self.progress.print(line)

    def _stopping(self) -> bool:
        """Whether a signal has reached any rank."""
        return self.strategy.any(bool(self.signals.received))

    def _lacks_validation(self) -> bool:
        """Whether the validation of the current step was interrupted."""
        due = self.step > 0 and self._due(self.config.train.eval_every)
        return due and self.validated.get("step") != self.step

    def update(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """One optimizer step on `tokens [B, T+1]`: loss (nats per token) and gradient norm, on the device."""
        self.recent[self.step] = tokens
        for group in self.optimizer.param_groups:
            group["lr"] = lr_at(self.config.optim, self.step, self.config.train.steps)
        loss = self.strategy.sum(self._accumulate(tokens))
        norm = self.strategy.clip(self.model, self.config.optim.clip_norm)
        if not self.guard.step(loss, norm):
            self._stop_nonfinite()
        if not self.guard.deferred:
            self.recent.clear()
        self.step += 1
        return loss, norm

    def _accumulate(self, tokens: Tensor) -> Tensor:
        """The gradient of the mean loss over `tokens [B, T+1]`, and that loss."""
        count = int(
            self.strategy.sum(count_targets(split_batch(tokens)[1]))
        )  # on the host: no wait for the device
        total = torch.zeros((), device=self.device)
        parts = tokens.chunk(self.config.train.accumulation)
        run: Callable[[Tensor, int], Tensor] = self._micro_step
        if self.graphs is None:
            self.optimizer.zero_grad(set_to_none=True)
        else:
            self.graphs.begin(parts[0])
            run = self.graphs
        for number, part in enumerate(parts, start=1):
            with self.strategy.micro_step(last=number == len(parts)):
                total = total + run(part, count)
            self.progress.reach(self.step + number / len(parts))
        return total

    def _micro_step(self, tokens: Tensor, count: int | Tensor) -> Tensor:
        """Add the gradient of the loss over `tokens [b, T+1]`, divided by `count`; that loss, detached."""
        loss = self._loss(self.wrapped, tokens, count, self.config.data.loader.packing)
        self.strategy.backward(loss)
        return loss.detach()

    def _loss(self, model: nn.Module, tokens: Tensor, count: int | Tensor, packed: bool = False) -> Tensor:
        """Summed cross-entropy over `count` of `tokens [b, T+1]`, rows of several documents if `packed`."""
        tokens, train = tokens.to(self.device, non_blocking=True), self.config.train
        inputs, targets = split_batch(tokens)
        apart = {"documents": split_documents(tokens)} if packed else {}
        with self._autocast():
            if train.inner == "online":
                assert isinstance(count, int)
                return online_loss(model, tokens, self.config.adapt, train.grad_through_write, count)
            logits, _ = model(inputs, **apart)
        return next_token_loss(logits, targets, count)

    def _autocast(self) -> AbstractContextManager[None]:
        if self.config.train.precision == "bf16":
            return torch.autocast(self.device.type, torch.bfloat16)
        return nullcontext()

    @torch.no_grad()
    def evaluate(self, limit: int | None = None) -> float | None:
        """Loss on the held-out part in nats per token. Every rank computes its rows of every batch.

        None if a signal asked for a stop before the last batch. Reads one number from the device, at the end.

        Args:
            limit: of so many batches, whatever signals ask for; None = as many as configured.
        """
        train, strategy = self.config.train, self.strategy
        self.model.eval()
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        tokens = 0
        size = train.batch_size // train.accumulation  # as many rows as training puts on the devices
        stopped = False
        for batch in sequential_batches(self.corpus.valid, train.seq_len, size, limit or train.eval_batches):
            if limit is None and (stopped := self._stopping()):
                break
            own = batch.chunk(strategy.world_size)[strategy.rank]
            total += self._loss(self.wrapped, own, 1).double()
            tokens += batch[:, 1:].numel()
        self.model.train()
        return None if stopped else float(strategy.sum(total)) / tokens

    def save(self) -> None:
        """Write a checkpoint unless this step has one. Raises NonFiniteError for a bad tensor."""
        if self.saved_step == self.step:
            return
        self._check_tensors()
        metrics = self.validated if self.validated.get("step") == self.step else {}
        with self.clock.paused():
            self.checkpoints.save(self.step, metrics)
        self.saved_step = self.step

    def _check_tensors(self) -> None:
        """Stop if a tensor is not finite: an update can damage weights even if its loss was finite."""
        if not self.guard.check():
            self._stop_nonfinite()
        tensors = self.strategy.saved_tensors(self.model, self.optimizer)
        if key := self.strategy.first(first_nonfinite(tensors.items())):
            kind, _, name = key.partition("/")
            raise NonFiniteError(
                f"step {self.step}: the first tensor that is not finite after the update is {kind} tensor "
                f"{name!r}; it was not saved; last good checkpoint: {self.store.latest() or 'none'}"
            )

    def _due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.config.train.steps

    def _log(self, loss: Tensor, norm: Tensor) -> dict[str, float]:
        """The only place in training where the host waits for the device."""
        if not self.guard.check():
            self._stop_nonfinite()
        self.recent.clear()
        train = self.config.train
        record = {
            "step": self.step,
            "loss": float(loss),
            "grad_norm": float(norm),
            "lr": self.optimizer.param_groups[0]["lr"],
            "tokens": self.step * train.batch_size * train.seq_len,
            "tokens_per_second": self.clock.rate(self.step) * train.batch_size * train.seq_len,
            "memory_gib": memory_gib(self.device),
        }
        self.writer.write(record)
        return record

    def _validate(self) -> str:
        with self.clock.paused():
            loss = self.evaluate()
        if loss is None:
            return f"step {self.step}: validation interrupted"
        if not math.isfinite(loss):
            self._check_tensors()
            raise NonFiniteError(
                f"step {self.step}: the validation loss is {loss}; the weights were not saved; "
                f"last good checkpoint: {self.store.latest() or 'none'}"
            )
        bits = loss / math.log(2) / self.corpus.bytes_per_token
        self.validated = {"step": self.step, "valid_loss": loss, "valid_bits_per_byte": bits}
        with self.clock.paused():
            effects = self._level_effects()
        levels = {name: value for effect in effects for name, value in effect.record().items()}
        self.writer.write(self.validated | levels)
        line = f"step {self.step}: validation loss {loss:.4f} nats/token, {bits:.4f} bits/byte"
        return "\n".join([line, *(f"  {effect.describe()}" for effect in effects)])

    def _level_effects(self) -> list[LevelEffect]:
        """What every level does, on the first batches of the held-out part; nothing without a watch."""
        if self.watch is None:
            return []
        train, strategy = self.config.train, self.strategy
        size = train.batch_size // train.accumulation
        batch = next(iter(sequential_batches(self.corpus.valid, train.seq_len, size, 1)))
        own = batch.chunk(strategy.world_size)[strategy.rank].to(self.device)

        def loss() -> float:
            found = self.evaluate(train.level_report)
            assert found is not None
            return found

        with self._autocast():
            return self.watch.measure(own[:, :-1], loss, strategy.sum)

    def _result(self, interrupted: bool) -> TrainResult:
        return TrainResult(
            step=self.step,
            valid_loss=self.validated.get("valid_loss"),
            bits_per_byte=self.validated.get("valid_bits_per_byte"),
            interrupted=interrupted,
            run_dir=self.config.run_dir,
            tokens=(self.step - self.first_step) * self.config.train.batch_size * self.config.train.seq_len,
            seconds=time.monotonic() - self.began,
        )

    def _stop_nonfinite(self) -> None:
        """Run the failed batch again with hooks and name the first bad tensor (one process only)."""
        step = self.first_step + int(self.guard.made)
        if self.strategy.world_size > 1:
            cause = "to be named by train.py, from the last checkpoint with the same settings"
        else:
            cause = self._diagnose(self.recent[step]) or "not to be found by running the step again"
        raise NonFiniteError(
            f"step {step + 1}: the first tensor that is not finite is {cause}; the update was not made; "
            f"last good checkpoint: {self.store.latest() or 'none'}"
        )

    def _diagnose(self, tokens: Tensor) -> str | None:
        self.graphs = None  # their memory is needed, and they run no hooks
        count, packed = tokens[:, 1:].numel(), self.config.data.loader.packing
        with torch.compiler.set_stance("force_eager"):  # hooks do not run inside a compiled module
            for part in tokens.chunk(self.config.train.accumulation):
                if found := find_nonfinite(self.model, partial(self._loss, self.model, part, count, packed)):
                    return found
        return None


def slow_levels(config: HopeConfig, model: nn.Module) -> dict[str, tuple[int, list[str]]]:
    """Levels that are not updated at every step: name → (steps between two updates, names of parameters)."""
    periods = {
        level.name: level.chunk_size // config.seq_len
        for level in config.levels
        if config.seq_len and level.chunk_size and config.level_kind(level) == "slow"
    }
    if not periods:
        return {}
    assert isinstance(model, HopeLM)
    names = model.slow_parameters()
    return {name: (period, names[name]) for name, period in periods.items()}
