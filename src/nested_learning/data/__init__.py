"""Text and synthetic data: tokenizers, cached corpora, resumable batches."""

from nested_learning.data.config import DataConfig, LoaderConfig, MixtureConfig, SourceConfig, TokenizerConfig
from nested_learning.data.corpus import Corpus, bundled_files, load_corpus, open_corpus, prepare_corpus
from nested_learning.data.loader import TokenLoader, WorkerBatches, sequential_batches, split_batch
from nested_learning.data.mixture import TokenMixture
from nested_learning.data.packing import split_documents
from nested_learning.data.shards import ShardFolder, ShardSet
from nested_learning.data.synthetic import parity_batch, recall_batch
from nested_learning.data.tokenizer import (
    ByteTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    load_tokenizer,
    train_sentencepiece,
    train_tokenizer,
)

__all__ = [
    "ByteTokenizer",
    "Corpus",
    "DataConfig",
    "LoaderConfig",
    "MixtureConfig",
    "SentencePieceTokenizer",
    "ShardFolder",
    "ShardSet",
    "SourceConfig",
    "TokenLoader",
    "TokenMixture",
    "Tokenizer",
    "TokenizerConfig",
    "WorkerBatches",
    "bundled_files",
    "load_corpus",
    "load_tokenizer",
    "open_corpus",
    "parity_batch",
    "prepare_corpus",
    "recall_batch",
    "sequential_batches",
    "split_batch",
    "split_documents",
    "train_sentencepiece",
    "train_tokenizer",
]
