"""Samples by weight, and the figures of a coverage report by hand."""

import json

import pytest
from texts import documents

from nested_learning.data import ByteTokenizer, train_sentencepiece
from nested_learning.data.config import FilterConfig, MixtureConfig, SourceConfig
from nested_learning.data.pipeline.coverage import altered_texts, coverage, coverage_table
from nested_learning.data.pipeline.process import document_digest, split_of
from nested_learning.data.pipeline.sampling import sample_mixture
from nested_learning.data.tokenizer import SentencePieceTokenizer, encode_document, text_segments


@pytest.fixture
def mixture(tmp_path):
    sources = []
    for name, weight, first in (("a", 3.0, 0), ("b", 1.0, 500)):
        path = tmp_path / f"{name}.jsonl"
        texts = ["tiny", *documents(200, first)]
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts) + "broken\n")
        rules = FilterConfig(min_chars=20)
        sources.append(SourceConfig(name=name, kind="jsonl", path=str(path), weight=weight, filter=rules))
    return MixtureConfig(sources=tuple(sources), valid_share=0.2)


def test_samples_follow_the_weights(mixture):
    samples = sample_mixture(mixture, 40_000, progress=False)
    assert {name: sample.wanted for name, sample in samples.items()} == {"a": 30_000, "b": 10_000}
    for name, sample in samples.items():
        assert sample.wanted <= sample.chars < sample.wanted + 600  # at most a document too much
        assert sample.problems == 1
        texts = documents(200, 0 if name == "a" else 500)
        positions = [texts.index(text) for text in sample.training]
        assert positions == sorted(positions) and positions[-1] > 150  # from all over the source
    assert sample_mixture(mixture, 40_000, progress=False) == samples


def test_held_out_documents_are_not_drawn(mixture):
    sample = sample_mixture(mixture, 10**9, progress=False)["a"]
    splits = {text: split_of(document_digest(text), len(text), mixture) for text in documents(200)}
    assert sample.training == [text for text, split in splits.items() if split == "train"]
    assert sample.held_out == [text for text, split in splits.items() if split == "valid"]
    assert sample.chars < sample.wanted


def test_coverage_by_hand():
    found = coverage(ByteTokenizer(), ["two words", "naïve"])
    assert (found.documents, found.bytes, found.tokens) == (2, 15, 15)
    assert found.fertility == 5 and found.bytes_per_token == 1 and found.byte_share == 1
    assert found.unknown == 0 and found.lossless and found.used == len(set("two wordsnave" + "xy")) / 257
    row = coverage_table({"x": found}).splitlines()[2].replace(" ", "")
    assert row.startswith("|x|2|0.00|5.000|1.000|0.00000|1.0000|")
    with pytest.raises(ValueError, match="nothing to measure"):
        coverage(ByteTokenizer(), [])


def lossy_model(**options):
    """A model without byte fallback, as others make them: unknown characters are lost."""
    import io

    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(documents(40)),
        model_writer=model,
        vocab_size=90,
        minloglevel=3,
        bos_id=-1,
        **options,
    )
    return SentencePieceTokenizer(model.getvalue())


def test_lost_text_is_seen():
    tokenizer = lossy_model()
    found = coverage(tokenizer, ["the whale 漢"])
    assert found.unknown > 0 and not found.lossless
    assert any("漢字" in text for text, _ in altered_texts(tokenizer))
    own = train_sentencepiece(documents(40), 400)
    assert altered_texts(own) == [] and coverage(own, ["the whale 漢"]).byte_share > 0


def test_segments_are_the_text():
    text = "a line\n" * 30 + "long " * 40 + "x" * 100 + "  two  spaces" * 10
    for limit in (1, 7, 16, 50, 10_000):
        pieces = list(text_segments(text, limit))
        assert "".join(pieces) == text and max(map(len, pieces)) <= limit
    assert list(text_segments("ab\ncd ef  gh", 6)) == ["ab\n", "cd ef", "  gh"]
    assert list(text_segments("", 5)) == [""]


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_long_documents_encode_as_a_whole_does(model_type):
    text = "\n".join(documents(60)) + " and one line without an end " * 200
    tokenizer = train_sentencepiece([text], 380, model_type)
    assert tokenizer.segment_chars == 1 << 14
    tokenizer.segment_chars = 300
    assert encode_document(tokenizer, text).tolist() == [*tokenizer.encode(text), tokenizer.eos_id]


def test_models_that_put_a_space_before_a_text_are_not_cut():
    tokenizer = lossy_model(normalization_rule_name="identity")
    assert tokenizer.segment_chars == 1 << 20
    text = "\n".join(documents(60))
    assert encode_document(tokenizer, text).tolist() == [*tokenizer.encode(text), tokenizer.eos_id]


def test_bad_sizes_are_named(mixture):
    with pytest.raises(ValueError, match="num_chars must be at least 1, got 0"):
        sample_mixture(mixture, 0, progress=False)
