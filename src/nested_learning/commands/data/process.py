r"""From raw text to token shards: filter, drop copies, hold out, tokenize, write.

uv run nl data process configs/data/sample.yaml \
    --tokenizer-path outputs/tokenizers/sample/tokenizer.model --log-file outputs/data/sample.log

After an interruption the same command resumes where it stopped and writes the same bytes.
"""

from __future__ import annotations

import os
from pathlib import Path

from nested_learning.command import Parser
from nested_learning.commands.data.common import add_limit_options, file_log, with_limits
from nested_learning.config import load_data_config
from nested_learning.data.config import DataConfig
from nested_learning.data.pipeline.process import ProcessingJob, process_mixture
from nested_learning.data.pipeline.store import clear_folder
from nested_learning.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer


def parser() -> Parser:
    """The options of `nl data process`."""
    made = Parser(description=__doc__)
    add = made.add_argument
    add("config", type=Path, help="a configuration with a mixture, such as configs/data/sample.yaml")
    add("overrides", nargs="*", help="fields of it, such as mixture.seed=1")
    model = "a SentencePiece model (default: tokenizer.path of the configuration)"
    add("--tokenizer-path", type=Path, help=model)
    add("--output-dir", type=Path, help="where shards go (default: shards of the configuration)")
    add("--log-file", type=Path)
    workers = max(1, (os.cpu_count() or 2) - 1)
    add("--workers", type=int, default=workers, help="default %(default)s; 0 = none")
    add_limit_options(made)
    add("--overwrite", action="store_true", help="start anew, deleting what the output folder holds")
    add("--no-progress", action="store_true")
    return made


def main() -> None:
    """Process a mixture and print how to train on the shards."""
    options = parser().parse_args()
    config = load_data_config(options.config, options.overrides)
    folder = options.output_dir or (Path(config.shards) if config.shards else None)
    if folder is None:
        raise ValueError(f"{options.config} names no `shards` folder; give --output-dir")
    log = file_log(options.log_file)
    job = ProcessingJob(
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
    """The model at `path`, or else the one that the configuration names.

    Raises:
        ValueError: neither names one.
    """
    if path is None and config.tokenizer.path is None:
        if config.tokenizer.kind == "byte":
            return ByteTokenizer()
        raise ValueError(
            "no tokenizer: give --tokenizer-path (make one with scripts/data/train_tokenizer.py)"
        )
    return load_tokenizer(path or Path(str(config.tokenizer.path)))
