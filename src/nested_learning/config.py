"""The configuration of a run: typed, validated, and the only place where a default is written.

YAML files and the command line hold differences from these defaults. `load_config` turns a file and
overrides into a `RunConfig`; code never sees a DictConfig.
"""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError

from nested_learning.adapt.config import AdaptConfig, check_online
from nested_learning.data.config import LoaderConfig, MixtureConfig
from nested_learning.models.config import HopeConfig
from nested_learning.optim.config import (
    DeepMomentumConfig,
    DeltaMomentumConfig,
    DGDConfig,
    M3Config,
    MuonConfig,
)

SCHEMA = "run_schema"


@dataclass(kw_only=True, slots=True)
class TokenizerConfig:
    """The tokenizer of a run.

    Args:
        kind: "bpe" or "unigram" (SentencePiece, trained on the training text at first use) or "byte".
        vocab_size: number of tokens; 257 for "byte" (256 bytes and the end of text).
        path: a SentencePiece model to use instead of training one; `vocab_size` must be its size.
    """

    kind: str = "bpe"
    vocab_size: int = 1024
    path: str | None = None

    def __post_init__(self) -> None:
        _one_of("data.tokenizer.kind", self.kind, ("bpe", "unigram", "byte"))
        _at_least("data.tokenizer.vocab_size", self.vocab_size, 257)
        if self.kind == "byte" and self.vocab_size != 257:
            raise ValueError(
                f"data.tokenizer.vocab_size must be 257 for data.tokenizer.kind = byte, got {self.vocab_size}"
            )


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """Text, tokenizer and the part held out.

    Args:
        files: UTF-8 text files; the word "bundled" stands for the text that comes with the package.
        tokenizer: how text becomes tokens.
        cache_dir: where tokenizers and token files are kept; None = `~/.cache/nested_learning`.
        valid_fraction: part of the text of `files` held out for validation, in (0, 1).
        shards: a folder made by `scripts/data/process_mixture.py`; it is used instead of `files`, with the
            tokenizer and the held-out documents in it.
        mixture: the sources of such shards; only the scripts in `scripts/data/` read it.
        loader: how tokens become rows of a batch.
    """

    files: tuple[str, ...] = ("bundled",)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    cache_dir: str | None = None
    valid_fraction: float = 0.05
    shards: str | None = None
    mixture: MixtureConfig | None = None
    loader: LoaderConfig = field(default_factory=LoaderConfig)

    def __post_init__(self) -> None:
        self.files = tuple(self.files)
        if not 0 < self.valid_fraction < 1:
            raise ValueError(f"data.valid_fraction must be in (0, 1), got {self.valid_fraction}")


@dataclass(kw_only=True, slots=True)
class OptimConfig:
    """Optimizer and schedule of the outer loop.

    Args:
        name: "adamw", "sgd", or a rule for matrices: "muon", "m3", "dgd", "delta_momentum" or
            "deep_momentum". Beside these, AdamW takes what is no matrix (see `optim.build`).
        lr: highest learning rate.
        betas, eps: of AdamW.
        adamw_lr_scale: learning rate of AdamW beside a rule for matrices, over `lr`.
        momentum: of "sgd".
        muon, m3, dgd, delta_momentum, deep_momentum: of the rule of that name (see `optim.config`).
        weight_decay: on matrices and heads only (see `optim.param_groups`).
        clip_norm: limit of the global norm of the gradient; None = no limit.
        schedule: "cosine" (to `min_lr_ratio * lr` at the last step) or "constant", after the warm-up.
        warmup_steps: steps of linear warm-up.
        min_lr_ratio: last learning rate over the highest.
    """

    name: str = "adamw"
    lr: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    adamw_lr_scale: float = 1.0
    momentum: float = 0.9
    muon: MuonConfig = field(default_factory=MuonConfig)
    m3: M3Config = field(default_factory=M3Config)
    dgd: DGDConfig = field(default_factory=DGDConfig)
    delta_momentum: DeltaMomentumConfig = field(default_factory=DeltaMomentumConfig)
    deep_momentum: DeepMomentumConfig = field(default_factory=DeepMomentumConfig)
    weight_decay: float = 0.1
    clip_norm: float | None = 1.0
    schedule: str = "cosine"
    warmup_steps: int = 20
    min_lr_ratio: float = 0.1

    def __post_init__(self) -> None:
        self.betas = (self.betas[0], self.betas[1])
        rules = ("muon", "m3", "dgd", "delta_momentum", "deep_momentum")
        _one_of("optim.name", self.name, ("adamw", "sgd", *rules))
        _one_of("optim.schedule", self.schedule, ("cosine", "constant"))
        for name in ("lr", "eps", "adamw_lr_scale"):
            if getattr(self, name) <= 0:
                raise ValueError(f"optim.{name} must be positive, got {getattr(self, name)}")
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise ValueError(f"optim.clip_norm must be positive or null, got {self.clip_norm}")
        for name in ("weight_decay", "momentum", "warmup_steps"):
            _at_least(f"optim.{name}", getattr(self, name), 0)
        if not 0 <= self.min_lr_ratio <= 1:
            raise ValueError(f"optim.min_lr_ratio must be in [0, 1], got {self.min_lr_ratio}")


@dataclass(kw_only=True, slots=True)
class TrainConfig:
    """Length of a run, its batches, and when it looks at itself. All intervals count steps.

    Args:
        steps: number of optimizer updates.
        seq_len: tokens per sequence.
        batch_size: sequences per step, over all micro-batches.
        accumulation: micro-batches per step (divides `batch_size`); the gradient does not depend on it.
        precision: "fp32", or "bf16" for automatic mixed precision.
        compile: `torch.compile` attention, MLPs and memory writes.
        device: a PyTorch device; "auto" = CUDA if there is one.
        log_every, eval_every, save_every: intervals of metrics, validation and checkpoints.
        eval_batches: micro-batches of a validation; None = the whole held-out part.
        keep_last: newest checkpoints kept; the best one is kept besides.
        output_dir: the run lives in `output_dir/name`.
        resume: "auto" = go on from the newest checkpoint of the run if there is one; a path = from
            that checkpoint; None = start anew, replacing what the run directory holds.
        sample_prompt, sample_tokens: prompt and length of the text written at the end; 0 = none.
        inner: "none", or "online": fast weights also learn from the loss of every chunk, as `adapt` says, in
            training and validation. Every sequence starts from the parameters.
        grad_through_write: differentiate through those gradients too (second order); False = first order.
    """

    steps: int = 200
    seq_len: int = 256
    batch_size: int = 8
    accumulation: int = 1
    precision: str = "fp32"
    compile: bool = False
    device: str = "auto"
    log_every: int = 10
    eval_every: int = 50
    save_every: int = 100
    eval_batches: int | None = 8
    keep_last: int = 2
    output_dir: str = "outputs"
    resume: str | None = "auto"
    sample_prompt: str = "The "
    sample_tokens: int = 64
    inner: str = "none"
    grad_through_write: bool = False

    def __post_init__(self) -> None:
        _one_of("train.precision", self.precision, ("fp32", "bf16"))
        _one_of("train.inner", self.inner, ("none", "online"))
        if self.grad_through_write and self.inner == "none":
            raise ValueError("train.grad_through_write must be false for train.inner = none, got true")
        positive = "steps seq_len batch_size accumulation log_every eval_every save_every keep_last"
        for name in positive.split():
            _at_least(f"train.{name}", getattr(self, name), 1)
        _at_least("train.sample_tokens", self.sample_tokens, 0)
        if self.eval_batches is not None:
            _at_least("train.eval_batches", self.eval_batches, 1)
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"train.accumulation must divide train.batch_size = {self.batch_size}, "
                f"got {self.accumulation}"
            )


@dataclass(kw_only=True, slots=True)
class ParallelConfig:
    """How a model is fitted to its devices. What a launcher does not name below, it does not read.

    Args:
        activation_checkpointing: keep only the inputs of blocks and compute the rest again in the
            backward pass: less memory, about a third more time, the same gradient.
        gather_dtype: "fp32" or "bf16", in which FSDP gathers parameters ("bf16": half the traffic).
        reduce_dtype: "fp32" or "bf16", in which FSDP reduces gradients.
        reshard_after_forward: FSDP frees a block's gathered parameters after its forward pass, and
            gathers them again for the backward pass: less memory, half as much traffic again.
        cpu_offload: FSDP keeps parameters, gradients and optimizer state in the memory of the host.
        deepspeed: DeepSpeed's JSON configuration; batch sizes and clipping are filled in.
        async_save: checkpoints are copied and then written in the background (not with DeepSpeed).
        timeout_minutes: how long a rank waits for the others before it gives up.
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
        for name in ("gather_dtype", "reduce_dtype"):
            _one_of(f"parallel.{name}", getattr(self, name), ("fp32", "bf16"))
        if self.timeout_minutes <= 0:
            raise ValueError(f"parallel.timeout_minutes must be positive, got {self.timeout_minutes}")


@dataclass(kw_only=True, slots=True)
class LoggingConfig:
    """Where metrics go besides `metrics.jsonl`.

    Args:
        wandb: "none", "offline" or "online".
        project: project name in W&B.
        progress: show a progress bar.
    """

    wandb: str = "none"
    project: str = "nested-learning"
    progress: bool = True

    def __post_init__(self) -> None:
        _one_of("logging.wandb", self.wandb, ("none", "offline", "online"))


@dataclass(kw_only=True, slots=True)
class RunConfig:
    """Everything that decides a run. In files, `model.vocab_size` and `model.seq_len` follow
    `data.tokenizer.vocab_size` and `train.seq_len`."""

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
        length = self.train.seq_len
        if self.train.inner == "online":
            again = self.train.compile or self.parallel.activation_checkpointing
            check_online(self.adapt, self.model, length, self.train.grad_through_write, again)
            if self.data.loader.packing:
                raise ValueError(
                    "data.loader.packing must be false for train.inner = online, which knows no documents"
                )
        if self.optim.name == "dgd" and self.train.compile:
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


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def _at_least(name: str, value: float, least: float) -> None:
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def register_schema() -> None:
    """Make the dataclasses known to Hydra as `run_schema`, the first entry of every defaults list."""
    schema = OmegaConf.structured(RunConfig)
    schema.model.vocab_size = "${data.tokenizer.vocab_size}"
    schema.model.seq_len = "${train.seq_len}"
    ConfigStore.instance().store(name=SCHEMA, node=schema)


def run_config(values: DictConfig | dict[str, Any]) -> RunConfig:
    """A validated `RunConfig`.

    Raises:
        ValueError: a key that the dataclasses do not have, or a value that is not allowed.
        omegaconf.errors.ValidationError: a value of the wrong type.
    """
    plain = OmegaConf.to_container(values, resolve=True) if isinstance(values, DictConfig) else values
    try:
        merged = OmegaConf.merge(OmegaConf.structured(RunConfig), plain)
    except ConfigKeyError as error:
        allowed = ", ".join(item.name for item in fields(error.object_type)) if error.object_type else ""
        raise ValueError(f"unknown key {error.full_key!r}; allowed beside it: {allowed}") from None
    config = OmegaConf.to_object(merged)
    assert isinstance(config, RunConfig)
    return config


def load_data_config(path: str | Path, overrides: list[str] | None = None) -> DataConfig:
    """The data section of a run from a file of its own, such as `configs/data/refinedweb_mixture.yaml`.

    Args:
        path: a YAML file with the fields of `DataConfig`.
        overrides: `["mixture.seed=1", ...]`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a key that `DataConfig` does not have, or a value that is not allowed.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no configuration file {path}")
    given = OmegaConf.merge(OmegaConf.load(path), OmegaConf.from_dotlist(overrides or []))
    return run_config(OmegaConf.create({"data": given})).data


def load_config(path_or_name: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """Compose a configuration as the command line would.

    Args:
        path_or_name: a YAML file, or the name of an entry of `configs/` such as "pilot_smoke".
        overrides: Hydra overrides such as `["optim.lr=1e-3", "experiment=mixer_attention"]`.

    Raises:
        FileNotFoundError: there is no such file.
        hydra.errors.ConfigCompositionException: an override or a file with an unknown key or a wrong type.
        ValueError: a value that is not allowed.
    """
    root, name = _locate(path_or_name)
    register_schema()
    GlobalHydra.instance().clear()
    with initialize_config_dir(config_dir=str(root), version_base="1.3"):
        composed = compose(config_name=name, overrides=overrides or [])
    return run_config(composed)


def _locate(path_or_name: str | Path) -> tuple[Path, str]:
    """Folder of the configurations, and the name of one relative to it."""
    path = Path(path_or_name)
    homes = [Path(), Path("configs"), Path(__file__).resolve().parents[2] / "configs"]
    for home in homes:
        file = (home / path.with_suffix(".yaml")).resolve()
        if file.is_file():
            root = next((p for p in file.parents if p.name == "configs"), file.parent)
            return root, file.relative_to(root).with_suffix("").as_posix()
    raise FileNotFoundError(f"no configuration {str(path_or_name)!r}; give a file or a name in configs/")


def set_seed(seed: int) -> None:
    """Seed Python, NumPy and PyTorch (every device)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
