"""The same as `nl eval class-incremental`."""

from nested_learning.command import run_script
from nested_learning.commands.evaluation.class_incremental import main

if __name__ == "__main__":
    run_script(main)
