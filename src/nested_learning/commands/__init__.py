"""The command line: every module here is one command with a `main` that reads `sys.argv`. `nl` finds them."""
