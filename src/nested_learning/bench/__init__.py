"""The benchmark: speed, memory and counted operations of the mixers against a plain Transformer.

`scripts/bench/speed.py` is its command line; `docs/performance.md` says what the numbers mean.
"""
