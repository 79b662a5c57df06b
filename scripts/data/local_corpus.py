"""The same as `nl data local-corpus`."""

from nested_learning.command import run_script
from nested_learning.commands.data.local_corpus import main

if __name__ == "__main__":
    run_script(main)
