"""The same as `nl eval summarise`."""

from nested_learning.command import run_script
from nested_learning.commands.evaluation.summarise import main

if __name__ == "__main__":
    run_script(main)
