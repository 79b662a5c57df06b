"""The same as `nl eval held-out`."""

from nested_learning.command import run_script
from nested_learning.commands.evaluation.held_out import main

if __name__ == "__main__":
    run_script(main)
