"""The model card that lies beside the weights."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from nested_learning.report import markdown_table

if TYPE_CHECKING:
    from nested_learning.hf.config import HopeForCausalLMConfig

HEAD = """---
library_name: transformers
pipeline_tag: text-generation
license: mit
tags: [nested-learning, hope]
---
"""
USE = """
## Use

```python
import nested_learning.hf  # registers the classes; pip package nested-learning-torch
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
tokens = tokenizer("Call me", return_tensors="pt")
print(tokenizer.decode(model.generate(**tokens, max_new_tokens=40)[0]))
```

`model.model` is the `HopeLM` itself: rows of any lengths, streaming, explicit memories.

## Limits

A language model repeats what its training text says, also where that is wrong or harmful. Memories hold
what the model reads in a context; a state that is saved holds traces of that text.
"""


def write_card(config: HopeForCausalLMConfig, folder: str | PathLike[str]) -> Path:
    """Write `README.md` into a folder, unless it has one; the path."""
    path = Path(folder) / "README.md"
    if not path.exists():
        path.write_text(card(config), encoding="utf-8")
    return path


def card(config: HopeForCausalLMConfig) -> str:
    """The text of the card: what the model is, how it was trained, how to load it."""
    own, training = config.hope_config, config.training
    title = training.get("name", "HOPE model")
    levels = ", ".join(f"{level.name} ({own.level_kind(level)})" for level in own.levels)
    rows = [
        ["mixer", own.mixer],
        ["width, layers, heads", f"{own.dim}, {own.num_layers}, {own.num_heads}"],
        ["vocabulary", str(own.vocab_size)],
        ["tokens between two writes", str(own.chunk_size)],
        ["levels", levels],
        *([name.replace("_", " "), str(value)] for name, value in training.items() if name != "name"),
    ]
    intro = (
        f"# {title}\n\nA language model whose memories learn while it reads, made with nested-learning "
        "(Nested Learning: Behrouz et al., [arXiv 2512.24695](https://arxiv.org/abs/2512.24695)).\n\n"
    )
    return HEAD + intro + markdown_table(["", "value"], rows) + USE
