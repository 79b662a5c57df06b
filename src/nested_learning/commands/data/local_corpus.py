"""Write a corpus of real text without a network: documentation, docstrings and code of Python packages.

uv run nl data local-corpus --output-dir outputs/data/local_corpus --megabytes 60

Writes prose.jsonl.gz (.rst, .md and .txt files), docstrings.jsonl.zst and code.parquet, about a third of the
size each, to try the pipeline on all formats (configs/data/local.yaml). The corpus is for experiments on your
own machine: the texts are under the licences of their packages.
"""

from __future__ import annotations

import ast
import gzip
import json
import os
import site
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from nested_learning.checks import positive
from nested_learning.command import Parser
from nested_learning.progress import progress_bar


def main() -> None:
    """Collect the texts and write them."""
    parser = Parser(description=__doc__)
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--megabytes", type=float, default=60, help="of text, in all (default %(default)s)")
    options = parser.parse_args()
    positive("--megabytes", options.megabytes)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    texts = {"prose.jsonl.gz": prose(), "docstrings.jsonl.zst": docstrings(), "code.parquet": code()}
    for name, found in texts.items():
        path = options.output_dir / name
        size = write_corpus(path, found, int(options.megabytes * 1e6 / len(texts)))
        print(f"{path}: {size / 1e6:.1f} MB of text")


def _files(*endings: str) -> Iterator[str]:
    """Texts of the files of the installed packages and the standard library, in a fixed order."""
    for root in dict.fromkeys([*site.getsitepackages(), sysconfig.get_path("stdlib")]):
        for folder, folders, names in os.walk(root):
            folders.sort()
            for name in sorted(names):
                if name.endswith(endings):
                    try:
                        yield Path(folder, name).read_text(encoding="utf-8")
                    except UnicodeDecodeError:
                        continue


def prose() -> Iterator[str]:
    """Files of documentation, licences and changes."""
    return _files(".rst", ".md", ".txt")


def code() -> Iterator[str]:
    """Python files."""
    return _files(".py")


def docstrings() -> Iterator[str]:
    """For every Python file its docstrings, concatenated."""
    warnings.simplefilter("ignore", SyntaxWarning)
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for text in _files(".py"):
        try:
            found = [ast.get_docstring(n) for n in ast.walk(ast.parse(text)) if isinstance(n, kinds)]
        except (SyntaxError, ValueError, RecursionError):
            continue
        if any(found):
            yield "\n\n".join(filter(None, found))


def write_corpus(path: Path, texts: Iterator[str], most: int) -> int:
    """Write texts until there are `most` bytes of UTF-8 text, and return how many were written.

    Args:
        path: ends in .jsonl.gz, .jsonl.zst or .parquet, which decides the format.
        texts: empty ones are skipped.
        most: the text that reaches this size is the last one.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    size, kept = 0, []
    with progress_bar(total=most, unit="B", unit_scale=True, desc=path.name) as bar:
        for text in texts:
            if text.strip():
                kept.append(text)
                size += len(text.encode("utf-8"))
                bar.update(len(text.encode("utf-8")))
            if size >= most:
                break
    lines = "".join(json.dumps({"text": text}) + "\n" for text in kept).encode()
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines, mtime=0))
    elif path.suffix == ".zst":
        with pa.CompressedOutputStream(str(path), "zstd") as stream:
            stream.write(lines)
    else:
        pq.write_table(pa.table({"text": kept}), path, row_group_size=1000)
    return size
