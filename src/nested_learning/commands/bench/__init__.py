"""Speed and memory of models, optimizers and training over several processes."""

COMMANDS = {
    "speed": "nested_learning.commands.bench.speed",
    "cms": "nested_learning.commands.bench.cms",
    "optimizers": "nested_learning.commands.bench.optimizers",
    "distributed": "nested_learning.commands.bench.distributed",
}
"""Name after `nl bench` → its module."""
