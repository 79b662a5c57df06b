"""The same as `nl eval continual`."""

from nested_learning.command import run_script
from nested_learning.commands.evaluation.continual import main

if __name__ == "__main__":
    run_script(main)
