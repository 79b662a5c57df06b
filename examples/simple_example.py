"""Three levels, three clocks: train a nested model whose levels are updated every 1, 16 and 256 steps.

    uv run python examples/simple_example.py [--input-size 768 --hidden-size 3072]

The task: a melody of 16 fixed random vectors goes round and round; say the next one.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from tqdm import tqdm

from nested_learning import ChunkedUpdateScheduler, NestedModel, set_seed, setup_optimizers

BATCH, TIME, NOTES = 4, 8, 16


def batches(width: int, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Eight vectors in a row from a random place of the melody, `[B, T, D]`, and those that come next."""
    melody = torch.randn(NOTES, width)
    for _ in range(steps):
        notes = torch.randint(NOTES, (BATCH, 1)) + torch.arange(TIME + 1)
        played = melody[notes % NOTES]
        yield played[:, :-1], played[:, 1:]


def main(arguments: Sequence[str] | None = None) -> list[float]:
    """Train and say which level was updated how often; the loss of every step."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--input-size", type=int, default=192)
    parser.add_argument("--hidden-size", type=int, default=768)
    parser.add_argument("--steps", type=int, default=512)
    parser.add_argument("--lr", type=float, default=1e-3)
    options = parser.parse_args(arguments)

    set_seed(0)
    model = NestedModel(input_size=options.input_size, hidden_size=options.hidden_size)
    periods = {"level1_fast": 1, "level2_medium": 16, "level3_slow": 256}
    scheduler = ChunkedUpdateScheduler(periods)
    optimizers = setup_optimizers(model=model, periods=periods, base_lr=options.lr)
    criterion = nn.MSELoss()
    loader = tqdm(batches(options.input_size, options.steps), total=options.steps, unit="step")
    losses = []
    for step, (data, targets) in enumerate(loader, 1):
        loss = criterion(model(data), targets)
        loss.backward()
        for name, module in model.levels.items():
            if scheduler.should_update(name, step):
                optimizers[name].step()
                scheduler.mark_updated(name, step)
                module.zero_grad()  # only this level: the others keep gathering
        losses.append(loss.item())
        loader.set_postfix(loss=f"{losses[-1]:.4f}")
        report(loader, scheduler, step, losses)
    print(f"loss of the first step {losses[0]:.4f}, of the last {losses[-1]:.4f}")
    for name, numbers in scheduler.statistics().items():
        print(f"{name}: {numbers['updates']} updates in {options.steps} steps")
    return losses


def report(bar: tqdm, scheduler: ChunkedUpdateScheduler, step: int, losses: list[float]) -> None:
    """Say so when more than the fast level was updated."""
    due = scheduler.due(step)
    if len(due) > 1:
        mean = sum(losses[-16:]) / len(losses[-16:])
        bar.write(f"step {step:4d}: updated {', '.join(due)}; mean loss of the last 16 steps {mean:.4f}")


if __name__ == "__main__":
    main()
