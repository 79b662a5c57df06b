"""`python -m nested_learning` is `nl`, for launchers such as torchrun."""

import sys

from nested_learning.commands.nl import main

if __name__ == "__main__":
    sys.exit(main())
