"""What two processes cost over one, for the same total work.

uv run nl bench distributed

Every process computes with one thread. CPU seconds are summed over the processes; waiting costs none.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time

from nested_learning.command import Parser
from nested_learning.config import load_config

RUNS = {"single": 1, "ddp": 2, "fsdp": 2}


def worker(strategy: str, entry: str, steps: int) -> None:
    """Make `steps` updates in this process and print the seconds they took."""
    import torch

    from nested_learning.data.corpus import load_corpus
    from nested_learning.runtime import set_seed
    from nested_learning.train.launch import build_model
    from nested_learning.train.strategy import build_strategy
    from nested_learning.train.trainer import Trainer

    torch.set_num_threads(1)
    folder = tempfile.mkdtemp()
    config = load_config(entry, ["train.device=cpu", f"train.output_dir={folder}"])
    built = build_strategy(strategy, config)
    corpus = load_corpus(config.data)
    set_seed(config.seed)
    trainer = Trainer(config, build_model(config, built.device), corpus, built)
    for _ in range(2):
        trainer.update(next(trainer.loader))
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(steps):
        trainer.update(next(trainer.loader))
    times = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    print("\n" + json.dumps({key: value / steps for key, value in times.items()}), flush=True)
    built.close()


def measure(strategy: str, entry: str, steps: int) -> tuple[float, float]:
    """Wall seconds and CPU seconds of all processes, per step."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(RUNS[strategy])]
    command += ["-m", __name__, "--worker", strategy, "--config-name", entry, "--steps", str(steps)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(rows) == RUNS[strategy], done.stdout
    return max(row["wall"] for row in rows), sum(row["cpu"] for row in rows)


def main() -> None:
    """Print the table."""
    parser = Parser(description=__doc__)
    parser.add_argument("--config-name", default="pilot_smoke")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--worker", choices=RUNS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.worker, options.config_name, options.steps)
        return
    load_config(options.config_name)  # what is wrong with it is said here, not by every process
    print("| processes | seconds per step | CPU seconds per step | CPU over one process |")
    print("|---|--:|--:|--:|")
    base = None
    for strategy, count in RUNS.items():
        wall, cpu = measure(strategy, options.config_name, options.steps)
        base = base or cpu
        print(f"| {strategy} x {count} | {wall:.3f} | {cpu:.3f} | {cpu / base - 1:+.1%} |", flush=True)


if __name__ == "__main__":  # of a worker
    main()
