"""Evaluate checkpoints, and compare their results."""

EVALUATIONS = {
    "zeroshot": "nested_learning.commands.evaluation.zeroshot",
    "long-perplexity": "nested_learning.commands.evaluation.long_perplexity",
    "held-out": "nested_learning.commands.evaluation.held_out",
    "niah": "nested_learning.commands.evaluation.niah",
    "passkey": "nested_learning.commands.evaluation.passkey",
    "continual": "nested_learning.commands.evaluation.continual",
    "forgetting": "nested_learning.commands.evaluation.forgetting",
    "class-incremental": "nested_learning.commands.evaluation.class_incremental",
    "second-reading": "nested_learning.commands.evaluation.second_reading",
    "compare": "nested_learning.commands.evaluation.compare",
    "summarise": "nested_learning.commands.evaluation.summarise",
}
"""Name after `nl eval` → its module."""
