r"""Measure speed and memory of the data path on text of this machine.

uv run nl data measure --tokenizer-path outputs/tokenizers/local/tokenizer.model \
    --output-dir outputs/data/measure

Make the text with `nl data local-corpus`. Times are CPU seconds, so that other work on the machine does not
change them much.
"""

from __future__ import annotations

import json
import shutil
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from nested_learning.checks import one_of
from nested_learning.command import Parser
from nested_learning.config import load_data_config
from nested_learning.data.config import DedupConfig, FilterConfig, MixtureConfig, SourceConfig
from nested_learning.data.loader import TokenLoader
from nested_learning.data.pipeline.process import ProcessingJob, process_mixture
from nested_learning.data.pipeline.sources import Document, read_source
from nested_learning.data.shards import ShardFolder
from nested_learning.data.tokenizer import load_tokenizer


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """What a piece of work cost.

    Args:
        megabytes: of UTF-8 text.
        cpu_seconds: CPU time.
        peak_mib: largest resident memory of the process, in MiB.
    """

    megabytes: float
    cpu_seconds: float
    peak_mib: float

    @property
    def rate(self) -> float:
        """Megabytes per second of one core."""
        return self.megabytes / self.cpu_seconds


def parser() -> Parser:
    """The options of `nl data measure`."""
    made = Parser(description=__doc__)
    add = made.add_argument
    add("--manifest", type=Path, default=Path("configs/data/local.yaml"))
    add("--source", default="docstrings", help="the source to take text from (default %(default)s)")
    add("--tokenizer-path", type=Path, required=True)
    add("--output-dir", type=Path, required=True)
    add("--megabytes", type=float, nargs=2, default=(10, 100), metavar=("SMALL", "LARGE"))
    add("--model-tokens-per-second", type=float, help="speed of training, to compare the loader with")
    return made


def main() -> None:
    """Write text of two sizes, measure each step in a process of its own, and print a table."""
    options = parser().parse_args()
    mixture = load_data_config(options.manifest).mixture
    sources = {source.name: source for source in (mixture.sources if mixture else ())}
    one_of("--source", options.source, sources)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    model, shards = options.tokenizer_path, options.output_dir / "shards"
    text = options.output_dir / "text.jsonl"
    print("| text, MB | step | MB/s of one core | peak memory, MiB |\n|---|---|---|---|")
    for wanted in options.megabytes:
        size = write_text(sources[options.source], text, wanted)
        steps = {
            "SentencePiece, one batch in memory": (batch_encoding, model, text),
            "tokenize and shard": (tokenize_and_shard, model, text, shards, size),
            "filter, drop copies, tokenize, shard": (full_pipeline, model, text, shards, size),
        }
        for name, (function, *arguments) in steps.items():
            used = in_a_process(function, *arguments)
            print(f"| {size:.1f} | {name} | {used.rate:.2f} | {used.peak_mib:.0f} |", flush=True)
    rate = loader_rate(shards, seq_len=256, batch_size=8, steps=2000)
    print(f"\nloader: {rate / 1e6:.2f} M tokens/s of one core (8 rows of 256 tokens)")
    if options.model_tokens_per_second:
        print(f"that is {rate / options.model_tokens_per_second:.0f} times what training takes")


def write_text(source: SourceConfig, path: Path, megabytes: float) -> float:
    """Write megabytes of a source as jsonl, and return how many were written.

    A source with less text is written several times, with another word at the start of each line.

    Args:
        source: where the text comes from.
        path: of the jsonl file.
        megabytes: of UTF-8 text, at least.

    Raises:
        ValueError: the source holds no text.
    """
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
    """Read, tokenize and write shards without filters, in this process."""
    mixture = MixtureConfig(sources=(_plain(path),), dedup=DedupConfig(exact=False, near=False))
    return _process(model, mixture, folder, megabytes)


def full_pipeline(model: Path, path: Path, folder: Path, megabytes: float) -> Usage:
    """Filter, drop exact and near copies, tokenize and write shards, in this process."""
    source = replace(_plain(path), filter=FilterConfig(max_symbols=0.5, max_boilerplate=0.5))
    return _process(model, MixtureConfig(sources=(source,)), folder, megabytes)


def loader_rate(folder: Path, seq_len: int, batch_size: int, steps: int) -> float:
    """Tokens per CPU second of a loader in this process."""
    (tokens,) = ShardFolder(folder).open("train").values()
    loader = TokenLoader(tokens, seq_len, batch_size, seed=0)
    next(loader)
    start = time.process_time()
    for _ in range(steps):
        next(loader)
    return steps * seq_len * batch_size / (time.process_time() - start)


def in_a_process(function: Any, *arguments: Any) -> Any:
    """Call a function in a fresh process, so that its peak memory is not that of earlier work."""
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
        ProcessingJob(
            mixture=mixture, tokenizer=load_tokenizer(model), folder=folder, progress=False, log=_silent
        )
    )
    seconds = time.process_time() - start
    return Usage(megabytes=megabytes, cpu_seconds=seconds, peak_mib=peak_memory())


def _plain(path: Path) -> SourceConfig:
    return SourceConfig(name="text", kind="jsonl", path=str(path))


def _silent(line: str) -> None:
    pass
