"""The same as `nl bench cms`."""

from nested_learning.command import run_script
from nested_learning.commands.bench.cms import main

if __name__ == "__main__":
    run_script(main)
