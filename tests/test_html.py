"""Pages are well-formed, escape what they are given, and load nothing."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser

import pytest

from nested_learning.html import Markup, page, picture, preformatted, table
from nested_learning.report import new_figure


class Tags(HTMLParser):
    """Collects text, and fails where a closing tag does not close the last open one."""

    VOID = frozenset({"meta", "img", "br"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_a_page_is_well_formed_and_keeps_its_text() -> None:
    wild = "<script>a & b</script>"
    made = page(wild, wild, [(wild, [wild, table([wild], [[wild]]), preformatted(wild), Markup("<b>c</b>")])])
    tags = Tags()
    tags.feed(made)
    assert tags.open == [] and "<script" not in made and "<b>c</b>" in made
    assert "".join(tags.words).count(wild) == 8


def test_a_figure_stands_inside() -> None:
    made = picture(new_figure(2, 1), 'a "b"')
    found = re.search(r'alt="a &quot;b&quot;" src="data:image/png;base64,([^"]+)"', made)
    assert found is not None and base64.b64decode(found[1]).startswith(b"\x89PNG")


def test_a_table_refuses_a_row_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match="a row has 1 cells, the header has 2"):
        table(["a", "b"], [["1"]])
