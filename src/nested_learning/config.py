"""The configuration of a run: typed, validated, and the only place where a default is written.

YAML files and the command line hold differences from these defaults. `load_config` turns a file and
overrides into a `RunConfig`; code never sees a DictConfig.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path, PurePath
from typing import Any, cast

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from nested_learning.adapt.config import AdaptConfig, check_online
from nested_learning.aliases import our_arguments, our_path
from nested_learning.checks import (
    at_least,
    build,
    check_types,
    did_you_mean,
    one_of,
    positive,
    unknown_key,
    within,
)
from nested_learning.data.config import LoaderConfig, MixtureConfig
from nested_learning.models.config import HopeConfig
from nested_learning.optim.config import (
    DeepMomentumConfig,
    DeltaMomentumConfig,
    DGDConfig,
    M3Config,
    MuonConfig,
)
from nested_learning.resume_with import check_resume_with
from nested_learning.runtime import check_device
from nested_learning.yaml_files import check_yaml, load_yaml

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
        check_types(self, "data.tokenizer")
        one_of("data.tokenizer.kind", self.kind, ("bpe", "unigram", "byte"))
        at_least("data.tokenizer.vocab_size", self.vocab_size, 257)
        if self.kind == "byte" and self.vocab_size != 257:
            raise ValueError(
                f"data.tokenizer.vocab_size must be 257 for data.tokenizer.kind = byte, got {self.vocab_size}"
            )


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """Text, tokenizer and the part held out.

    Args:
        files: UTF-8 text files, folders of them or patterns such as `books/*.txt`; the word "bundled" stands
            for the text that comes with the package.
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
        check_types(self, "data")
        within("data.valid_fraction", self.valid_fraction, "(0, 1)")


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
        check_types(self, "optim")
        rules = ("muon", "m3", "dgd", "delta_momentum", "deep_momentum")
        one_of("optim.name", self.name, ("adamw", "sgd", *rules))
        one_of("optim.schedule", self.schedule, ("cosine", "constant"))
        for name in ("lr", "eps", "adamw_lr_scale", "clip_norm"):
            positive(f"optim.{name}", getattr(self, name))
        for name in ("weight_decay", "warmup_steps"):
            at_least(f"optim.{name}", getattr(self, name), 0)
        for beta in self.betas:
            within("optim.betas", beta, "[0, 1)")
        within("optim.momentum", self.momentum, "[0, 1)")
        within("optim.min_lr_ratio", self.min_lr_ratio, "[0, 1]")


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
        resume_with: fields that may differ from the checkpoint's when a run goes on, such as `optim.lr`;
            others that decide a run may not.
        init_from: a checkpoint (a run directory, a checkpoint folder or an exported file) whose weights,
            model and tokenizer a new run begins with, instead of those configured.
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
    resume_with: tuple[str, ...] = ()
    init_from: str | None = None
    sample_prompt: str = "The "
    sample_tokens: int = 64
    inner: str = "none"
    grad_through_write: bool = False

    def __post_init__(self) -> None:
        check_types(self, "train")
        check_device(self.device, "train.device")
        one_of("train.precision", self.precision, ("fp32", "bf16"))
        one_of("train.inner", self.inner, ("none", "online"))
        if self.grad_through_write and self.inner == "none":
            raise ValueError("train.grad_through_write must be false for train.inner = none, got true")
        counts = "steps seq_len batch_size accumulation log_every eval_every save_every keep_last"
        for name in counts.split():
            at_least(f"train.{name}", getattr(self, name), 1)
        at_least("train.sample_tokens", self.sample_tokens, 0)
        at_least("train.eval_batches", self.eval_batches, 1)
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
        check_types(self, "parallel")
        for name in ("gather_dtype", "reduce_dtype"):
            one_of(f"parallel.{name}", getattr(self, name), ("fp32", "bf16"))
        within("parallel.timeout_minutes", self.timeout_minutes, "(0, 1e6]")


@dataclass(kw_only=True, slots=True)
class LoggingConfig:
    """Where metrics go besides `metrics.jsonl`.

    Args:
        wandb: "none", "offline" or "online".
        project: project name in W&B.
        path: one more file for the lines of `metrics.jsonl`, such as "logs/run.json"; None = no other.
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
        check_types(self, "")
        check_name(self.name)
        check_resume_with(self.train.resume_with, RunConfig)
        within("seed", self.seed, f"[0, {2**63})")
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
    """
    return build(RunConfig, plain_values(values) if isinstance(values, DictConfig) else values)


def plain_values(values: DictConfig) -> dict[str, Any]:
    """OmegaConf's values as a dictionary, interpolations resolved; ValueError where one cannot be."""
    try:
        return cast(dict[str, Any], OmegaConf.to_container(values, resolve=True))
    except OmegaConfBaseException as error:
        raise ValueError(one_line(error)) from error


def check_name(name: str) -> None:
    """A run's name is a path below `train.output_dir`; ValueError for one that leaves it or is no path."""
    parts = PurePath(name).parts
    fits = all(part != ".." and len(part.encode()) <= 255 for part in parts) and name.isprintable()
    if not parts or PurePath(name).is_absolute() or not fits:
        raise ValueError(f"name must be a folder name, or several joined by /, without .., got {name!r}")


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
    try:
        given = OmegaConf.merge(load_yaml(path), OmegaConf.from_dotlist(overrides or []))
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise ValueError(f"{path} with {overrides or 'no overrides'}: {one_line(error)}") from error
    return run_config(OmegaConf.create({"data": given})).data


def load_config(path_or_name: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """Compose a configuration as the command line would.

    Args:
        path_or_name: a YAML file, or the name of an entry of `configs/` such as "pilot_smoke".
        overrides: Hydra overrides such as `["optim.lr=1e-3", "experiment=mixer_attention"]`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: an override or a file that cannot be read, an unknown key, or a value that is not allowed.
    """
    root, name = _locate(path_or_name)
    for file in {root / f"{name}.yaml", *root.glob("*/*.yaml")}:
        check_yaml(file)
    register_schema()
    GlobalHydra.instance().clear()
    overrides = our_arguments(overrides or [])
    with initialize_config_dir(config_dir=str(root), version_base="1.3"), composing(overrides):
        composed = compose(config_name=name, overrides=overrides)
    return run_config(composed)


@contextmanager
def composing(overrides: list[str]) -> Iterator[None]:
    """Turn whatever Hydra and OmegaConf raise about files and `overrides` into a ValueError of one line."""
    try:
        yield
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise ValueError(one_line(error)) from error
    except (ValueError, AttributeError, TypeError, LookupError) as error:  # Hydra's, of odd overrides
        what = " ".join(overrides) or "the configuration"
        raise ValueError(f"cannot apply {what}: {one_line(error)}") from error


def one_line(error: BaseException) -> str:
    """What Hydra or OmegaConf complain about, with the reason, which stands in the error's cause."""
    cause = error.__cause__
    if isinstance(cause, ConfigKeyError | ConfigAttributeError) and cause.full_key:
        key = str(cause.full_key)
        if is_dataclass(cause.object_type):
            return unknown_key(key, cause.object_type, key.rpartition(".")[0])
        return unknown_key(key, RunConfig)
    if isinstance(error, MissingConfigException):
        near = did_you_mean(Path(error.missing_cfg_file or "").name, error.options or [])
        return f"there is no configuration {error.missing_cfg_file!r}{near}"
    where = next((w for e in (error, cause) for w in (_place(e),) if w), "")
    wrong = re.search(
        r"Value '(.*)' of type '\w+' could not be converted to (Float|Integer)", str(cause or error)
    )
    if wrong and where:
        kind = "a finite number" if wrong[2] == "Float" else "a whole number"
        return f"{where.partition('=')[0]} must be {kind}, got {wrong[1]!r}"
    what, *more = str(error).strip().split("\n")
    why = str(cause).split("\n")[0] if cause else next((line for line in more if line[:1].strip()), "")
    return ": ".join(part for part in ("" if where in what else where, what, why) if part)


def _place(error: BaseException | None) -> str:
    """The key or the override that an error of Hydra or OmegaConf is about."""
    key = re.search(r"full_key: (\S+)", str(error))
    return key[1] if key else getattr(error, "override", None) or ""


def _locate(path_or_name: str | Path) -> tuple[Path, str]:
    """Folder of the configurations, and the name of one relative to it."""
    path = Path(our_path(path_or_name))
    homes = [Path(), Path("configs"), Path(__file__).resolve().parents[2] / "configs"]
    for home in homes:
        file = (home / path.with_suffix(".yaml")).resolve()
        if file.is_file():
            root = next((p for p in file.parents if p.name == "configs"), file.parent)
            return root, file.relative_to(root).with_suffix("").as_posix()
    near = did_you_mean(path.stem, (file.stem for home in homes[1:] for file in home.glob("*.yaml")))
    raise FileNotFoundError(
        f"no configuration {str(path_or_name)!r}; give a file or a name in configs/{near}"
    )
