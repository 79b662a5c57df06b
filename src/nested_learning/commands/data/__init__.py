"""From raw text to token shards, and checks of what was made."""

COMMANDS = {
    "tokenizer": "nested_learning.commands.data.tokenizer",
    "check-tokenizer": "nested_learning.commands.data.check_tokenizer",
    "process": "nested_learning.commands.data.process",
    "validate": "nested_learning.commands.data.validate",
    "local-corpus": "nested_learning.commands.data.local_corpus",
    "measure": "nested_learning.commands.data.measure",
    "draw-rows": "nested_learning.commands.data.draw_rows",
}
"""Name after `nl data` → its module."""
