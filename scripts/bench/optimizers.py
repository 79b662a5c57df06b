"""The same as `nl bench optimizers`."""

from nested_learning.command import run_script
from nested_learning.commands.bench.optimizers import main

if __name__ == "__main__":
    run_script(main)
