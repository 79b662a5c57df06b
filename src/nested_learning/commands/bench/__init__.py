"""Speed and memory of models, optimizers and training over several processes."""

COMMANDS = {
    "speed": "nested_learning.commands.bench.speed",
    "gpu": "nested_learning.commands.bench.gpu",
    "cms": "nested_learning.commands.bench.cms",
    "optimizers": "nested_learning.commands.bench.optimizers",
    "distributed": "nested_learning.commands.bench.distributed",
}
"""Name after `nl bench` → its module."""
