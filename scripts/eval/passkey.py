"""The same as `nl eval passkey`."""

from nested_learning.command import run_script
from nested_learning.commands.evaluation.passkey import main

if __name__ == "__main__":
    run_script(main)
