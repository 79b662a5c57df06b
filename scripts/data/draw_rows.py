"""The same as `nl data draw-rows`."""

from nested_learning.command import run_script
from nested_learning.commands.data.draw_rows import main

if __name__ == "__main__":
    run_script(main)
