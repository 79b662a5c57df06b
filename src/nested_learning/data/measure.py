"""Speed and memory of the data path, measured on text of one's own."""

from __future__ import annotations

import json
import shutil
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from nested_learning.data.config import DedupConfig, FilterConfig, MixtureConfig, SourceConfig
from nested_learning.data.loader import TokenLoader
from nested_learning.data.process import Job, process_mixture
from nested_learning.data.shards import ShardFolder
from nested_learning.data.sources import Document, read_source
from nested_learning.data.tokenizer import load_tokenizer


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """What a piece of work cost: UTF-8 megabytes of text, seconds of a processor, peak memory in MiB."""

    megabytes: float
    cpu_seconds: float
    peak_mib: float

    @property
    def rate(self) -> float:
        """Megabytes per second of one core."""
        return self.megabytes / self.cpu_seconds


def write_text(source: SourceConfig, path: Path, megabytes: float) -> float:
    """Write so many megabytes of a source as jsonl, again and again with other words at the start of each
    line if there is less: megabytes written. Raises ValueError for a source without text."""
    size, turn = 0, 0
    with path.open("w", encoding="utf-8") as file:
        while size < megabytes * 1e6:
            for item in read_source(source):
                if not isinstance(item, Document):
                    continue
                text = (
                    item.text if not turn else "\n".join(f"t{turn} {line}" for line in item.text.split("\n"))
                )
                size += len(text.encode("utf-8", "replace"))
                file.write(json.dumps({"text": text}) + "\n")
                if size >= megabytes * 1e6:
                    break
            turn += 1
            if not size:
                raise ValueError(f"source {source.name}: it holds no text")
    return size / 1e6


def batch_encoding(model: Path, path: Path) -> Usage:
    """SentencePiece's own encoding of all documents of a jsonl file in one call, on one thread."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    texts = [item.text for item in read_source(_plain(path)) if isinstance(item, Document)]
    size = sum(len(text.encode("utf-8")) for text in texts) / 1e6
    start = time.process_time()
    processor.encode(texts, num_threads=1)
    return Usage(megabytes=size, cpu_seconds=time.process_time() - start, peak_mib=peak_memory())


def tokenize_and_shard(model: Path, path: Path, folder: Path, megabytes: float) -> Usage:
    """Read, tokenize and write shards, nothing else, in this process."""
    mixture = MixtureConfig(sources=(_plain(path),), dedup=DedupConfig(exact=False, near=False))
    return _process(model, mixture, folder, megabytes)


def full_pipeline(model: Path, path: Path, folder: Path, megabytes: float) -> Usage:
    """The same with every filter and with exact and near copies dropped."""
    source = replace(_plain(path), filter=FilterConfig(max_symbols=0.5, max_boilerplate=0.5))
    return _process(model, MixtureConfig(sources=(source,)), folder, megabytes)


def loader_rate(folder: Path, seq_len: int, batch_size: int, steps: int) -> float:
    """Tokens per second of a processor that a loader gives in this process."""
    (tokens,) = ShardFolder(folder).open("train").values()
    loader = TokenLoader(tokens, seq_len, batch_size, seed=0)
    next(loader)
    start = time.process_time()
    for _ in range(steps):
        next(loader)
    return steps * seq_len * batch_size / (time.process_time() - start)


def in_a_process(function: Any, *arguments: Any) -> Any:
    """The result of a function called in a fresh process, so that its peak memory is its own."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def peak_memory() -> float:
    """Largest resident memory of this process so far, in MiB."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _process(model: Path, mixture: MixtureConfig, folder: Path, megabytes: float) -> Usage:
    shutil.rmtree(folder, ignore_errors=True)
    start = time.process_time()
    process_mixture(
        Job(mixture=mixture, tokenizer=load_tokenizer(model), folder=folder, progress=False, log=_silent)
    )
    seconds = time.process_time() - start
    return Usage(megabytes=megabytes, cpu_seconds=seconds, peak_mib=peak_memory())


def _plain(path: Path) -> SourceConfig:
    return SourceConfig(name="text", kind="jsonl", path=str(path))


def _silent(line: str) -> None:
    pass
