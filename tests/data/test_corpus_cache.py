"""The token cache notices damage and is made anew; texts without white space are split all the same."""

import re
import unicodedata

import numpy as np
import pytest

from nested_learning.data import ByteTokenizer, TokenizerConfig, prepare_corpus, train_tokenizer
from nested_learning.data.corpus import FORMAT_VERSION, split_validation
from nested_learning.data.tokenizer import encode_document

TEXT = "some words that are many enough to be split and encoded\n" * 60


def flip(path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path):
    path.write_bytes(b"")


def delete(path):
    path.unlink()


@pytest.mark.parametrize(
    "name", ["train.npy", "valid.npy", "statistics.json", "tokenizer.model", "checksums.json"]
)
@pytest.mark.parametrize("damage", [flip, cut, empty, delete])
def test_a_damaged_cache_is_made_anew(tmp_path, capsys, name, damage):
    path = tmp_path / "a.txt"
    path.write_text(TEXT)
    spec = TokenizerConfig(vocab_size=290)
    first = prepare_corpus([path], spec, tmp_path / "cache")
    train = np.array(first.train)
    folder = tmp_path / "cache" / "corpora" / first.provenance["key"]
    assert capsys.readouterr().err == ""
    damage(folder / name)
    again = prepare_corpus([path], spec, tmp_path / "cache")
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "is made anew" in err and (name in err or name == "checksums.json")
    assert np.array_equal(again.train, train) and again.provenance == first.provenance
    assert again.tokenizer.fingerprint == first.tokenizer.fingerprint
    assert (again.unigram_entropy, again.bytes_per_token) == (first.unigram_entropy, first.bytes_per_token)
    prepare_corpus([path], spec, tmp_path / "cache")
    assert capsys.readouterr().err == ""  # whole again
    assert [found.name for found in folder.parent.iterdir()] == [folder.name]


def test_the_cache_of_an_older_version_is_not_read():
    assert FORMAT_VERSION == 2  # 1 had no checksums and cut texts elsewhere


ONE_LINE = {
    "dna": "".join("ACGT"[i * i % 7 % 4] for i in range(200_000)) + "\n",
    "chinese": "天地玄黃宇宙洪荒" * 25_000 + "\n",
    "minified": "a=(b){return+b;}" * 12_000 + "\n",
    "emoji": "🐋" * 5_000 + "\n\n",
}


@pytest.mark.parametrize("name", ONE_LINE)
def test_a_text_in_one_line_is_split(tmp_path, name):
    text = ONE_LINE[name]
    train, valid = split_validation(text, 0.05)
    assert train + valid == text and abs(len(valid) - 0.05 * len(text)) < 1100
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    corpus = prepare_corpus([tmp_path / "a.txt"], ByteTokenizer(), tmp_path / "cache")
    back = [bytes(part[:-1].astype(np.uint8)).decode() for part in (corpus.train, corpus.valid)]
    assert back == [train, valid]  # both are whole characters


def test_a_cut_uses_a_boundary_that_is_near():
    text = "word " * 100 + "x" * 500 + " " + "y" * 100 + "\n"
    train, valid = split_validation(text, 0.3)  # the target is in the middle of the x
    assert (train[-2:], valid) == ("x ", "y" * 100 + "\n")
    code = ONE_LINE["minified"]
    assert split_validation(code, 0.05)[0][-1] in "(){}+=;"
    chinese = "一二三四五六七八九十。" * 100 + "\n"
    assert split_validation(chinese, 0.05)[0].endswith("。")
    far = "x" * 2000 + " " + "y" * 10 + "\n"
    assert len(split_validation(far, 0.9)[0]) == round(len(far) * 0.1)


@pytest.mark.parametrize("fraction", [0.01, 0.05, 0.5, 0.99])
def test_words_stay_whole_and_separators_too(fraction):
    words = [f"w{i}" for i in range(300)]
    text = "\n\f\n".join(" ".join(words[i : i + 30]) for i in range(0, 300, 30)) + "\n"
    train, valid = split_validation(text, fraction)
    assert train + valid == text
    assert train.split() + valid.split() == words and valid.strip()
    assert not valid.startswith(("\n", "\f", " "))


def test_a_long_document_is_encoded_in_segments(tmp_path):
    tokenizer = train_tokenizer(TokenizerConfig(vocab_size=290), [TEXT])
    (tmp_path / "a.txt").write_text(TEXT * 20)
    corpus = prepare_corpus([tmp_path / "a.txt"], tokenizer, tmp_path / "cache")
    train, _ = split_validation(TEXT * 20, 0.05)
    assert corpus.train.tolist() == [*tokenizer.encode(train), tokenizer.eos_id]


def test_windows_files_have_separators_too(tmp_path):
    from nested_learning.data.corpus import split_documents

    assert split_documents("one\r\n\f\r\ntwo\n\f\nthree") == ["one", "two", "three"]


@pytest.mark.parametrize("text", ["abc\ud800d", "é\udfff"])
@pytest.mark.parametrize(
    "spec", [TokenizerConfig(kind="byte", vocab_size=257), TokenizerConfig(vocab_size=290)]
)
def test_half_of_a_surrogate_pair_is_named(text, spec):
    tokenizer = train_tokenizer(spec, [TEXT])
    position = next(i for i, c in enumerate(text) if unicodedata.category(c) == "Cs")
    message = re.escape(
        f"text holds half of a surrogate pair, U+{ord(text[position]):04X}, at position {position}"
    )
    for use in (tokenizer.encode, lambda text: encode_document(tokenizer, text)):
        with pytest.raises(ValueError, match=message) as error:
            use(text)
        assert type(error.value) is ValueError
    with pytest.raises(ValueError, match=message):
        train_tokenizer(TokenizerConfig(vocab_size=290), [TEXT, text])
