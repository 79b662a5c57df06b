"""The same as `nl data check-tokenizer`."""

from nested_learning.command import run_script
from nested_learning.commands.data.check_tokenizer import main

if __name__ == "__main__":
    run_script(main)
