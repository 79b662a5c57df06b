"""The same as `nl eval forgetting`."""

from nested_learning.command import run_script
from nested_learning.commands.evaluation.forgetting import main

if __name__ == "__main__":
    run_script(main)
