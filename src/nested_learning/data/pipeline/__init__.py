"""From raw text to shards: sources, filters, copies, a resumable process and its store; samples and checks.

Training does not need any of it: `data.shards` and `data.loader` read the result.
"""
