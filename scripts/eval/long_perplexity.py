"""The same as `nl eval long-perplexity`."""

from nested_learning.command import run_script
from nested_learning.commands.evaluation.long_perplexity import main

if __name__ == "__main__":
    run_script(main)
