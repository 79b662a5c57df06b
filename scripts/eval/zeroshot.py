"""The same as `nl eval zeroshot`."""

from nested_learning.command import run_script
from nested_learning.commands.evaluation.zeroshot import main

if __name__ == "__main__":
    run_script(main)
