"""Real text from what is installed on any machine: documentation, docstrings and code of Python packages."""

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

from tqdm import tqdm


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
    """For every Python file its docstrings, one behind the other."""
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
    """Write texts as .jsonl.gz, .jsonl.zst or .parquet until there are `most` bytes; how many there were."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    size, kept = 0, []
    with tqdm(total=most, unit="B", unit_scale=True, desc=path.name, disable=None) as bar:
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
