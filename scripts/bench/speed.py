"""The same as `nl bench speed`."""

from nested_learning.command import run_script
from nested_learning.commands.bench.speed import main

if __name__ == "__main__":
    run_script(main)
