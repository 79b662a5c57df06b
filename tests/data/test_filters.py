"""Rules: shares counted by hand, the first rule that rejects is named, good prose passes."""

import pytest
from texts import document

from nested_learning.data import bundled_files
from nested_learning.data.config import FilterConfig
from nested_learning.data.corpus import split_documents
from nested_learning.data.pipeline.dedup import gram_hashes
from nested_learning.data.pipeline.filters import (
    boilerplate_share,
    duplicate_line_share,
    rejection,
    repeated_share,
    stop_word_share,
    symbol_share,
)

ENGLISH = FilterConfig(min_chars=50, language="en")
GERMAN = "Der Hund läuft durch den Wald und sucht einen Stock, den er nach Hause tragen kann."
CODE = (
    "def f(x):\n    return {k: v**2 for k, v in x.items()} | {'a': [1, 2][0] ^ 3 & 4}\n"
    + "y = $a#b@c%d^e&f*\n"
)


def test_shares_by_hand():
    assert symbol_share("ab, c.{}#$") == 4 / 10
    assert symbol_share("naïve “quoted” text – 漢字") == 0
    assert duplicate_line_share("a\n\n b\na\nc\n a ") == 2 / 5
    assert duplicate_line_share("\n \n") == 0
    assert boilerplate_share("Accept COOKIE policy, privacy policy\nText\n\nmore text\nSign up now") == 2 / 4
    assert stop_word_share(["the", "whale", "and", "sea"]) == 0.5
    assert repeated_share(
        gram_hashes(["a", "b", "c", "d", "e", "f", "a", "b", "c", "d", "e"])
    ) == pytest.approx(1 / 7)


@pytest.mark.parametrize(
    ("text", "rules", "reason"),
    [
        (document(1), ENGLISH, None),
        ("short", ENGLISH, "too_short"),
        (document(1), FilterConfig(max_chars=300), "too_long"),
        ("%$# " * 50, ENGLISH, "symbols"),
        ("the same line of words again\n" * 4 + document(2, 20), ENGLISH, "duplicate_lines"),
        (("the whale is in the sea " * 20).strip(), ENGLISH, "repetition"),
        (
            "We use a cookie for this and that.\nPlease subscribe to our newsletter.\n" + document(3, 20),
            ENGLISH,
            "boilerplate",
        ),
        (GERMAN, ENGLISH, "language"),
        (GERMAN, FilterConfig(min_chars=50), None),
        (CODE, ENGLISH, "symbols"),
        (CODE, FilterConfig(min_chars=50, max_symbols=0.5), None),
    ],
)
def test_the_first_rule_that_rejects_is_named(text, rules, reason):
    assert rejection(text, rules) == reason


def test_every_rule_can_be_switched_off():
    off = FilterConfig(
        min_chars=1, max_symbols=None, max_duplicate_lines=None, max_repeated_grams=None, max_boilerplate=None
    )
    for text in ("{}", "a\na\na", "a b c d e " * 50, "cookie"):
        assert rejection(text, off) is None


def test_bundled_prose_is_kept():
    texts = [
        text for file in bundled_files()[:1] for text in split_documents(file.read_text(encoding="utf-8"))
    ]
    reasons = [rejection(text, FilterConfig(language="en")) for text in texts]
    assert sum(reason is None for reason in reasons) >= 0.97 * len(texts)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_chars": 0}, "filter.min_chars must be at least 1, got 0"),
        ({"max_chars": 10}, "filter.max_chars must be at least min_chars = 200, got 10"),
        ({"language": "de"}, "filter.language must be en or null, got 'de'"),
        ({"max_symbols": 1.5}, r"filter.max_symbols must be in \[0, 1\], got 1.5"),
    ],
)
def test_bad_settings_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        FilterConfig(**options)
