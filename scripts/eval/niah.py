"""The same as `nl eval niah`."""

from nested_learning.command import run_script
from nested_learning.commands.evaluation.niah import main

if __name__ == "__main__":
    run_script(main)
