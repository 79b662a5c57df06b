"""Text and synthetic data: tokenizers, cached corpora, resumable batches."""

from nested_learning.data.corpus import Corpus, bundled_files, prepare_corpus
from nested_learning.data.loader import TokenLoader, sequential_batches
from nested_learning.data.synthetic import parity_batch, recall_batch
from nested_learning.data.tokenizer import (
    ByteTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    TokenizerSpec,
    load_tokenizer,
    train_sentencepiece,
)

__all__ = [
    "ByteTokenizer",
    "Corpus",
    "SentencePieceTokenizer",
    "TokenLoader",
    "Tokenizer",
    "TokenizerSpec",
    "bundled_files",
    "load_tokenizer",
    "parity_batch",
    "prepare_corpus",
    "recall_batch",
    "sequential_batches",
    "train_sentencepiece",
]
