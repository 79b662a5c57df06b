"""From raw text to token shards: filter, drop copies, hold out, tokenize, write. Resumable.

uv run python scripts/data/process_mixture.py configs/data/sample.yaml \
    --tokenizer-path outputs/tokenizers/sample/tokenizer.model --log-file outputs/data/sample.log

Interrupted or killed, the same command goes on where it stopped and ends in the same bytes.
"""

from __future__ import annotations

import os
from pathlib import Path

from nested_learning.command import Parser, run_script
from nested_learning.config import load_data_config
from nested_learning.data.config import DataConfig
from nested_learning.data.process import Job, process_mixture
from nested_learning.data.script import file_log, with_limits
from nested_learning.data.store import clear_folder
from nested_learning.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer


def parser() -> Parser:
    """The command line."""
    made = Parser(description=__doc__)
    add = made.add_argument
    add("config", type=Path, help="a configuration with a mixture, such as configs/data/sample.yaml")
    add("overrides", nargs="*", help="fields of it, such as mixture.seed=1")
    add(
        "--tokenizer-path",
        type=Path,
        help="a SentencePiece model (default: tokenizer.path of the configuration)",
    )
    add("--output-dir", type=Path, help="where shards go (default: shards of the configuration)")
    add("--log-file", type=Path)
    add(
        "--workers", type=int, default=max(1, (os.cpu_count() or 2) - 1), help="default %(default)s; 0 = none"
    )
    add("--limit", nargs="+", default=[], metavar="NAME=RECORDS", help="read at most so many records")
    add("--fallback-split", help="split of hub data sets that lack the wanted one")
    add("--overwrite", action="store_true", help="start anew, deleting what the output folder holds")
    add("--no-progress", action="store_true")
    return made


def main() -> None:
    """Parse and run."""
    options = parser().parse_args()
    config = load_data_config(options.config, options.overrides)
    folder = options.output_dir or (Path(config.shards) if config.shards else None)
    if folder is None:
        raise ValueError(f"{options.config} names no `shards` folder; give --output-dir")
    log = file_log(options.log_file)
    job = Job(
        mixture=with_limits(config.mixture, options.limit, options.fallback_split),
        tokenizer=pick_tokenizer(options.tokenizer_path, config),
        folder=folder,
        workers=options.workers,
        progress=not options.no_progress,
        log=log,
    )
    if options.overwrite:
        clear_folder(folder)
    process_mixture(job)
    log(
        f"complete: {folder}; train with data.shards={folder} "
        f"data.tokenizer.vocab_size={job.tokenizer.vocab_size}"
    )


def pick_tokenizer(path: Path | None, config: DataConfig) -> Tokenizer:
    """The model at `path`, else the one the configuration names."""
    if path is None and config.tokenizer.path is None:
        if config.tokenizer.kind == "byte":
            return ByteTokenizer()
        raise ValueError(
            "no tokenizer: give --tokenizer-path (make one with scripts/data/train_tokenizer.py)"
        )
    return load_tokenizer(path or Path(str(config.tokenizer.path)))


if __name__ == "__main__":
    run_script(main)
