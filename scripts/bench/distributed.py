"""The same as `nl bench distributed`."""

from nested_learning.command import run_script
from nested_learning.commands.bench.distributed import main

if __name__ == "__main__":
    run_script(main)
