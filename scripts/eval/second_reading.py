"""The same as `nl eval second-reading`."""

from nested_learning.command import run_script
from nested_learning.commands.evaluation.second_reading import main

if __name__ == "__main__":
    run_script(main)
