"""The same as `nl data measure`."""

from nested_learning.command import run_script
from nested_learning.commands.data.measure import main

if __name__ == "__main__":
    run_script(main)
