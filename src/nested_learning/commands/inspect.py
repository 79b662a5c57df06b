"""Show what the memories of a model do while it reads a text, as a page.

uv run nl inspect outputs/pilot --text notes.txt
uv run nl inspect outputs/pilot:best --text notes.txt --tokens 500 --output page.html --json numbers.json

The page needs nothing else: one file, to open in a browser. docs/inspection.md says what its numbers are.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from nested_learning.command import Parser

if TYPE_CHECKING:
    from nested_learning.eval.loading import Loaded
    from nested_learning.inspection.trace import Inspection

OUTPUT = Path("outputs/inspect")
MOST_TOKENS = 4096


def parser() -> Parser:
    """The options of `nl inspect`."""
    made = Parser(description=__doc__)
    add = made.add_argument
    add("checkpoint", help="run folder (FOLDER:best: its best), checkpoint, exported file; untrained")
    add("--text", type=Path, required=True, help="a text file; it is read from its beginning")
    add("--tokens", type=int, default=1000, help="tokens that are read, at most (default %(default)s)")
    add("--output", type=Path, help=f"the page (.html); default: below {OUTPUT}, by checkpoint and text")
    add("--json", type=Path, help="also write the numbers, of every head, to this file")
    add("--config", help="configuration instead of the checkpoint's own")
    add("--tokenizer-path", type=Path, help="SentencePiece model instead of the checkpoint's own")
    add("--device", default="cpu", help="auto, cpu, cuda, cuda:0 … or mps (default %(default)s)")
    return made


def main() -> None:
    """Read the text, write the page and print the table of memories."""
    options = parser().parse_args()
    check(options.tokens, options.output)
    from nested_learning.eval.loading import load
    from nested_learning.inspection.page import inspection_page
    from nested_learning.inspection.words import token_texts

    words = options.text.read_text(encoding="utf-8", errors="replace")
    loaded = load(options.checkpoint, options.config, options.tokenizer_path, options.device)
    inspection = read(loaded, words, options.tokens)
    ids = inspection.tokens.tolist()
    name = f"{loaded.config.name}-{loaded.sha256[:8]}"
    lead = f"{len(ids)} tokens of {options.text.name}, read by {name}."
    made = inspection_page(inspection, token_texts(loaded.tokenizer, ids), "What the memories did", lead)
    output: Path = options.output or OUTPUT / name / f"{options.text.stem}.html"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(made, encoding="utf-8")
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(inspection.to_dict()), encoding="utf-8")
    print(summary(inspection), end="")
    print(f"{output}: {output.stat().st_size / 1e6:.1f} MB")


def check(tokens: int, output: Path | None) -> None:
    """Refuse what the page could not hold, or a name that no browser opens. Raises ValueError."""
    if not 1 <= tokens <= MOST_TOKENS:
        raise ValueError(f"--tokens must be from 1 to {MOST_TOKENS}, got {tokens}")
    if output is not None and output.suffix not in (".html", ".htm"):
        raise ValueError(f"--output must end in .html, got {output}")


def read(loaded: Loaded, words: str, count: int) -> Inspection:
    """Inspect at most `count` tokens of a text, the end of a document before them.

    Raises:
        ValueError: an empty text, or as `inspect_memories` does.
    """
    import torch

    from nested_learning.eval.tokenizers import encode_long
    from nested_learning.inspection.inspect import inspect_memories

    if not words:
        raise ValueError("--text must not be empty")
    ids = [loaded.tokenizer.eos_id, *encode_long(loaded.tokenizer, words)][:count]
    return inspect_memories(loaded.model, torch.tensor([ids], device=loaded.device))


def summary(inspection: Inspection) -> str:
    """A table of the memories, and the mean loss."""
    from nested_learning.report import markdown_table

    rows = []
    for memory in inspection.memories:
        change = memory.per_write("relative_change")
        change = change[change.isfinite()]
        rows.append(
            [
                memory.label,
                str(len(memory.ends)),
                f"{memory.per_token('surprise').mean():.3g}",
                f"{memory.eta.mean():.3g}",
                f"{memory.alpha.mean():.5f}",
                f"{change.mean():.2%}" if len(change) else "-",
            ]
        )
    header = ["memory", "writes", "surprise", "η", "α", "change of a write"]
    loss = f"loss {inspection.loss[1:].mean():.4f} nats per token over {len(inspection.loss) - 1} tokens\n"
    return markdown_table(header, rows) + loss
