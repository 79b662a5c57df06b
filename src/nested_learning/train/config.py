"""The configuration of a run: typed and validated. Its sections are defined beside what they configure.

Defaults are written in these dataclasses only. YAML files and the command line hold differences from them,
and `nested_learning.config` reads both.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePath
from typing import Any

from nested_learning.adapt.config import AdaptConfig, check_online
from nested_learning.checks import at_least, build, check_types, one_of, within
from nested_learning.data.config import DataConfig
from nested_learning.models.config import HopeConfig
from nested_learning.ops.kernels import CHOICES
from nested_learning.optim.config import OptimConfig
from nested_learning.runtime import check_device
from nested_learning.train.resume_with import check_resume_with


@dataclass(kw_only=True, slots=True)
class TrainConfig:
    """Run length, batch size, and how often to log, evaluate and save. All intervals count steps.

    Args:
        steps: number of optimizer updates.
        seq_len: tokens per sequence.
        batch_size: sequences per step, over all micro-batches.
        accumulation: micro-batches per step (divides `batch_size`); the gradient does not depend on it.
        precision: "fp32", "bf16" for automatic mixed precision, or "auto" = bf16 on a CUDA card that has it,
            else fp32.
        compile: whether attention, MLPs and the chunks of memories go through `torch.compile`: "true",
            "false", or "auto" = where a compiler is installed and the run is long enough (500 steps on a
            CPU, 50 on a GPU).
        graphs: whether forward and backward pass run as CUDA graphs: "true", "false", or "auto" = on one
            CUDA device, from 20 steps on.
        kernels: of memories that have one: "triton", "torch" for plain PyTorch, or "auto" = Triton on a card
            that can run it.
        device: a PyTorch device; "auto" = CUDA if there is one.
        log_every, eval_every, save_every: intervals of metrics, validation and checkpoints.
        eval_batches: micro-batches of a validation; None = the whole held-out part.
        level_report: micro-batches that every validation reads again with each level of a CMS frozen, to say
            what the level does; 0 = no such report. Not where parameters are sharded.
        keep_last: number of newest checkpoints to keep; the best one is always kept.
        output_dir: the run lives in `output_dir/name`.
        resume: "auto" = resume from the newest checkpoint of the run if there is one; a path = resume from
            that checkpoint; None = start again and replace the content of the run directory.
        resume_with: fields whose values may differ from the checkpoint's when a run resumes, such as
            `optim.lr`; all other fields that decide the result must be the same.
        init_from: a checkpoint (a run directory, a checkpoint folder or an exported file) whose weights,
            model and tokenizer a new run starts with, instead of those configured.
        sample_prompt, sample_tokens: prompt and length of the text generated at the end; 0 = no text.
        inner: "none", or "online": fast weights also learn from the loss of every chunk, as `adapt` says, in
            training and validation. Every sequence starts from the parameters.
        grad_through_write: differentiate through those gradients too (second order); False = first order.
    """

    steps: int = 200
    seq_len: int = 256
    batch_size: int = 8
    accumulation: int = 1
    precision: str = "auto"
    compile: str = "auto"
    graphs: str = "auto"
    kernels: str = "auto"
    device: str = "auto"
    log_every: int = 10
    eval_every: int = 50
    save_every: int = 100
    eval_batches: int | None = 8
    level_report: int = 1
    keep_last: int = 2
    output_dir: str = "outputs"
    resume: str | None = "auto"
    resume_with: tuple[str, ...] = ()
    init_from: str | None = None
    sample_prompt: str = "The "
    sample_tokens: int = 64
    inner: str = "none"
    grad_through_write: bool = False

    def __post_init__(self) -> None:
        self.compile, self.graphs = (str(v).lower() for v in (self.compile, self.graphs))  # may be booleans
        check_types(self, "train")
        one_of("train.compile", self.compile, ("auto", "true", "false"))
        one_of("train.graphs", self.graphs, ("auto", "true", "false"))
        one_of("train.kernels", self.kernels, CHOICES)
        check_device(self.device, "train.device")
        one_of("train.precision", self.precision, ("auto", "fp32", "bf16"))
        one_of("train.inner", self.inner, ("none", "online"))
        if self.grad_through_write and self.inner == "none":
            raise ValueError("train.grad_through_write must be false for train.inner = none, got true")
        if self.grad_through_write and self.compile == "true":
            raise ValueError(
                "train.grad_through_write must be false for train.compile = true, whose steps can be "
                "differentiated once only; got true"
            )
        counts = "steps seq_len batch_size accumulation log_every eval_every save_every keep_last"
        for name in counts.split():
            at_least(f"train.{name}", getattr(self, name), 1)
        at_least("train.sample_tokens", self.sample_tokens, 0)
        at_least("train.level_report", self.level_report, 0)
        at_least("train.eval_batches", self.eval_batches, 1)
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"train.accumulation must divide train.batch_size = {self.batch_size}, "
                f"got {self.accumulation}"
            )


@dataclass(kw_only=True, slots=True)
class ParallelConfig:
    """How a model is fitted to its devices. A field that names a launcher is read by that launcher only.

    Args:
        activation_checkpointing: store only the inputs of blocks and recompute the rest in the backward
            pass: less memory, about a third more time, the same gradient.
        gather_dtype: "fp32" or "bf16", in which FSDP gathers parameters ("bf16": half the traffic).
        reduce_dtype: "fp32" or "bf16", in which FSDP reduces gradients.
        reshard_after_forward: FSDP frees a block's gathered parameters after its forward pass, and
            gathers them again for the backward pass: less memory, half as much traffic again.
        cpu_offload: FSDP keeps parameters, gradients and optimizer state in the memory of the host.
        deepspeed: DeepSpeed's JSON configuration; batch sizes and clipping are filled in.
        async_save: checkpoints are copied and then written in the background (not with DeepSpeed).
        timeout_minutes: how long a rank waits for the others before it raises an error.
    """

    activation_checkpointing: bool = False
    gather_dtype: str = "fp32"
    reduce_dtype: str = "fp32"
    reshard_after_forward: bool = True
    cpu_offload: bool = False
    deepspeed: str = "configs/deepspeed/zero1.json"
    async_save: bool = False
    timeout_minutes: float = 10.0

    def __post_init__(self) -> None:
        check_types(self, "parallel")
        for name in ("gather_dtype", "reduce_dtype"):
            one_of(f"parallel.{name}", getattr(self, name), ("fp32", "bf16"))
        within("parallel.timeout_minutes", self.timeout_minutes, "(0, 1e6]")


@dataclass(kw_only=True, slots=True)
class LoggingConfig:
    """Where metrics are written in addition to `metrics.jsonl`.

    Args:
        wandb: "none", "offline" or "online".
        project: project name in W&B.
        path: another file that gets the lines of `metrics.jsonl`, such as "logs/run.json"; None = no such
            file.
        progress: show a progress bar.
    """

    wandb: str = "none"
    project: str = "nested-learning"
    path: str | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        check_types(self, "logging")
        one_of("logging.wandb", self.wandb, ("none", "offline", "online"))


@dataclass(kw_only=True, slots=True)
class RunConfig:
    """Everything that decides a run. In files, `model.vocab_size` and `model.seq_len` follow
    `data.tokenizer.vocab_size` and `train.seq_len`.

    Args:
        name: of the run; its directory is `train.output_dir`/`name`.
        seed: of the initial weights, of the order of the data and of the sample at the end.
        model: the architecture.
        data: texts, tokenizer and how rows are made of them.
        optim: the optimizer and its schedule.
        train: length of the run, batches, validation, checkpoints, precision.
        parallel: what the launchers for several devices share.
        adapt: how a model learns at test time, and with `train.inner=online` in training.
        logging: where numbers go.
    """

    name: str = "run"
    seed: int = 0
    model: HopeConfig = field(default_factory=HopeConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    adapt: AdaptConfig = field(default_factory=AdaptConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    def __post_init__(self) -> None:
        check_types(self, "")
        check_name(self.name)
        check_resume_with(self.train.resume_with, RunConfig)
        within("seed", self.seed, f"[0, {2**63})")
        length = self.train.seq_len
        if self.train.inner == "online":
            again = self.train.compile == "true" or self.parallel.activation_checkpointing
            check_online(self.adapt, length, again)
            if self.data.loader.packing:
                raise ValueError(
                    "data.loader.packing must be false for train.inner = online, which knows no documents"
                )
        if self.optim.name == "dgd" and self.train.compile == "true":
            raise ValueError("optim.name = dgd watches inputs by hooks, which train.compile = true hides")
        if self.model.seq_len not in (None, length):
            raise ValueError(
                f"model.seq_len must be train.seq_len = {length} or null, got {self.model.seq_len}"
            )
        for level in self.model.levels:
            fast = self.model.level_kind(level) == "fast"
            if fast and level.chunk_size is not None and level.chunk_size >= length:
                slow = "" if self.model.seq_len else " (model.seq_len = train.seq_len makes longer ones slow)"
                raise ValueError(
                    f"model.levels.{level.name}.chunk_size must be less than train.seq_len = {length}, "
                    f"or no token ever reads what the level has learned{slow}; got {level.chunk_size}"
                )

    @property
    def run_dir(self) -> Path:
        """Directory of the run: checkpoints, metrics, plots and the resolved configuration."""
        return Path(self.train.output_dir) / self.name

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionary, for checkpoints; `run_config` reads it back."""
        return asdict(self)


def run_config(values: dict[str, Any]) -> RunConfig:
    """A validated `RunConfig` from plain values, sections as dictionaries.

    Raises:
        ValueError: a key that the dataclasses do not have, or a value that is not allowed.
    """
    return build(RunConfig, values)


def check_name(name: str) -> None:
    """A run's name is a path below `train.output_dir`; ValueError for one that leaves it or is no path."""
    parts = PurePath(name).parts
    fits = all(part != ".." and len(part.encode()) <= 255 for part in parts) and name.isprintable()
    if not parts or PurePath(name).is_absolute() or not fits:
        raise ValueError(f"name must be a folder name, or several joined by /, without .., got {name!r}")
