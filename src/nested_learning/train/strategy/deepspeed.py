"""DeepSpeed: ZeRO stages 1 to 3, by its own JSON configuration.

The objective, optimizer, schedule and clipping are the run's own; the JSON decides what is sharded over
ranks.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nested_learning.extras import MissingExtraError
from nested_learning.home import config_file
from nested_learning.train.checkpoint.errors import CheckpointError, cause
from nested_learning.train.checkpoint.tensors import WRAPPER, write_tensors
from nested_learning.train.compiling import settle
from nested_learning.train.config import RunConfig
from nested_learning.train.strategy.distributed import DistributedStrategy

OWN = {
    "train_batch_size": "train.batch_size",
    "train_micro_batch_size_per_gpu": "train.batch_size",
    "gradient_accumulation_steps": "train.accumulation",
    "gradient_clipping": "optim.clip_norm",
    "optimizer": "optim",
    "scheduler": "optim.schedule",
    "fp16": "train.precision",
    "bf16": "train.precision",
    "torch_autocast": "train.precision",
}
FOLDER, TAG = "deepspeed", "state"
WEIGHTS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
NEVER = 1_000_000_000


class DeepSpeedStrategy(DistributedStrategy):
    """The engine of DeepSpeed around model and optimizer.

    Checkpoints hold DeepSpeed's own files, from which DeepSpeed can resume on the same number of ranks, and
    the full weights, which every other reader understands.

    Raises:
        MissingExtraError: DeepSpeed is not installed.
        ValueError: a JSON that sets what the run's configuration decides, slow levels, or `async_save`.
    """

    name = "deepspeed"
    shards_parameters = True

    def __init__(self, config: RunConfig) -> None:
        slow = [level.name for level in config.model.levels if config.model.level_kind(level) == "slow"]
        if slow:
            raise ValueError(
                f"DeepSpeed joins parameters into one vector, so slow levels ({', '.join(slow)}) cannot wait "
                "for theirs; use train_dist.py or train_fsdp.py"
            )
        if config.parallel.async_save:
            raise ValueError("parallel.async_save must be false with DeepSpeed, got true")
        read_settings(config, 1)  # before anything expensive
        super().__init__(config)

    def prepare(
        self, model: nn.Module, make_optimizer: Callable[[nn.Module], Optimizer]
    ) -> tuple[nn.Module, Optimizer]:
        """DeepSpeed's engine, and an optimizer whose `step` is the engine's."""
        os.environ.setdefault("DS_ACCELERATOR", self.device.type)  # or DeepSpeed picks a device of its own
        try:
            import deepspeed
        except ImportError as error:
            raise MissingExtraError("train_deepspeed.py", "deepspeed") from error

        deepspeed.utils.logger.setLevel(logging.WARNING)

        settings = read_settings(settle(self.config, self.device), self.world_size)
        blocks = getattr(model, "blocks", ())
        if blocks:  # gathered as units, as with FSDP: memories read parameters outside of a forward pass
            deepspeed.utils.set_z3_leaf_modules(model, [type(blocks[0])])
        self.engine, *_ = deepspeed.initialize(
            model=model, optimizer=make_optimizer(model), config=settings, dist_init_required=False
        )
        self.clip_norm = self.config.optim.clip_norm
        return self.engine, EngineOptimizer(self.engine)

    @contextmanager
    def micro_step(self, last: bool) -> Iterator[None]:
        """Around forward and backward pass of a micro-batch; the engine counts those before the last."""
        yield
        if not last:
            self.engine.step()

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of this rank's part of the loss."""
        self.engine.backward(loss * self.world_size, scale_wrt_gas=False)

    def clip(self, model: nn.Module, max_norm: float | None) -> Tensor:
        """Global norm of the gradient, NaN if it is not finite. The engine clips in its own step."""
        optimizer = self.engine.optimizer
        if hasattr(optimizer, "scaled_global_norm"):  # stages 1 and 2
            norm = torch.as_tensor(optimizer.scaled_global_norm())
        else:
            groups = [torch.as_tensor(norm).float() for norm in optimizer._get_norm_groups()]
            norm = torch.linalg.vector_norm(torch.stack(groups))
            if any(bool(group < 0) for group in groups):
                norm = -norm
        return torch.where(norm < 0, torch.nan, norm).to(self.device)  # DeepSpeed's sign of overflow is −1

    def saved_tensors(self, model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
        """Weights (for stage 3, this rank's shards), and the optimizer state by number of the part."""
        weights = {f"model/{name}": getattr(p, "ds_tensor", p) for name, p in model.named_parameters()}
        inner = self.engine.optimizer.optimizer
        moments = {
            f"optimizer/{number}/{entry}": value
            for number, entries in enumerate(inner.state.values())
            for entry, value in entries.items()
            if isinstance(value, Tensor)
        }
        return weights | moments

    def save_parts(
        self, folder: Path, model: nn.Module, optimizer: Optimizer, background: bool
    ) -> tuple[dict[str, Any], Future[Any] | None]:
        """Write DeepSpeed's files, and the full weights on the main rank."""
        self.engine.save_checkpoint(str(folder / FOLDER), tag=TAG, save_latest=False)
        write_tensors(folder, self._whole_weights(model))
        return {"deepspeed": self.world_size}, None

    def load_parts(
        self, folder: Path, model: nn.Module, optimizer: Optimizer, values: dict[str, Any]
    ) -> None:
        """Resume from DeepSpeed's files.

        Raises:
            CheckpointError: there are none, they are for another number of ranks, or hold more than tensors.
        """
        found = values.get("deepspeed")
        if found != self.world_size:
            other = "another launcher" if found is None else f"DeepSpeed on {found} ranks"
            raise CheckpointError(
                f"cannot resume from {folder}: it was written by {other}, and DeepSpeed's optimizer state "
                f"is read by DeepSpeed on as many ranks only; this run has {self.world_size}"
            )
        try:
            with tensors_only():
                self.engine.load_checkpoint(str(folder / FOLDER), tag=TAG)
        except pickle.UnpicklingError as error:
            raise CheckpointError(f"a file in {folder / FOLDER} cannot be read: {cause(error)}") from error

    def _whole_weights(self, model: nn.Module) -> dict[str, Tensor]:
        """Every parameter, gathered one by one to the CPU memory of the main rank; nothing on other ranks."""
        from deepspeed.runtime.zero import GatheredParameters

        weights: dict[str, Tensor] = {}
        for name, parameter in model.named_parameters():
            with GatheredParameters([parameter]):
                if self.is_main:
                    weights[f"model/{name.replace(WRAPPER, '')}"] = parameter.detach().cpu().clone()
        return weights


class EngineOptimizer(Optimizer):
    """Adapts the DeepSpeed engine to the Optimizer interface, for a trainer that sets rates and steps."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The groups of the optimizer inside."""
        groups: list[dict[str, Any]] = self.engine.optimizer.param_groups
        return groups

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Does nothing: the engine clears gradients in its step."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Clip and update."""
        self.engine.step()


@contextmanager
def tensors_only() -> Iterator[None]:
    """Inside, a loaded file may hold tensors, plain values and the three classes of DeepSpeed's state only.

    DeepSpeed asks torch to unpickle anything; this variable of torch's overrules that.
    """
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    before = os.environ.get(WEIGHTS_ONLY)
    os.environ[WEIGHTS_ONLY] = "1"
    try:
        with torch.serialization.safe_globals([LossScaler, ZeroStageEnum, fragment_address]):
            yield
    finally:
        del os.environ[WEIGHTS_ONLY]
        if before is not None:
            os.environ[WEIGHTS_ONLY] = before


def read_settings(config: RunConfig, world_size: int) -> dict[str, Any]:
    """DeepSpeed's configuration: the JSON file, completed by the values of the run's configuration.

    Raises:
        FileNotFoundError: there is no such file, here or in the package.
        ValueError: the file sets one of those values, or has no valid stage of ZeRO.
    """
    path = config_file(config.parallel.deepspeed, "parallel.deepspeed")
    settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    for key in settings.keys() & OWN.keys():
        raise ValueError(f"{path} must not set {key!r}; {OWN[key]} decides it for every launcher")
    stage = settings.get("zero_optimization", {}).get("stage")
    if stage not in (1, 2, 3):
        raise ValueError(f"{path}: zero_optimization.stage must be 1, 2 or 3, got {stage}")
    train = config.train
    return {
        "steps_per_print": NEVER,
        "train_micro_batch_size_per_gpu": train.batch_size // train.accumulation // world_size,
        "gradient_accumulation_steps": train.accumulation,
        "gradient_clipping": config.optim.clip_norm or 0.0,
        **({"torch_autocast": {"enabled": True, "dtype": "bfloat16"}} if train.precision == "bf16" else {}),
        **settings,
    }
