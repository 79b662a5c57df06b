"""The command line: a module per command of `nl`, with a `main` that reads `sys.argv`.

`train` and `sweep` serve the entry points `train*.py` instead.
"""
