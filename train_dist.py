"""Train with DDP:  torchrun --nproc-per-node 2 train_dist.py [--config-name pilot] [optim.lr=1e-3 ...]"""

import hydra
from omegaconf import DictConfig

from nested_learning.commands.train import ENTRY, run_job, run_training
from nested_learning.config import register_schema

register_schema()


@hydra.main(version_base="1.3", config_path="configs", config_name=ENTRY)
def main(config: DictConfig) -> None:
    """Run one job."""
    run_job(config, "ddp")


if __name__ == "__main__":
    run_training(main)
