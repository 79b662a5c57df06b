"""The site builds strictly, loads nothing from elsewhere, and its links lead somewhere."""

from __future__ import annotations

import os
import subprocess
import sys
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "scripts" / "docs" / "mkdocs.yml"
sys.path.insert(0, str(CONFIG.parent))


class Page(HTMLParser):
    """What a page loads, where it links to, and its anchors."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.anchors |= {values["id"]} if "id" in values else set()
        if tag in ("script", "img", "iframe") and values.get("src"):
            self.loads.append(values["src"])
        if tag == "link" and values.get("rel") in ("stylesheet", "icon", "preconnect"):
            self.loads.append(values["href"])
        if tag == "a" and values.get("href"):
            self.links.append(values["href"])


def test_the_configuration_page_is_up_to_date() -> None:
    import configuration

    assert configuration.PAGE.read_text(encoding="utf-8") == configuration.page()
    assert "| `optim.lr` |" in configuration.page()
    empty = [line for line in configuration.page().splitlines() if line.endswith("|  |")]
    assert empty == []  # every field has its sentence


def test_every_page_has_a_place_in_the_navigation() -> None:
    import yaml

    sections = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))["nav"]
    listed = [page for section in sections for pages in section.values() for page in pages]
    assert len(set(listed)) == len(listed)
    assert {path.name for path in (ROOT / "docs").glob("*.md")} <= set(listed)


def test_links_out_of_the_folder_lead_to_pages_or_become_words() -> None:
    pytest.importorskip("mkdocs")
    import hooks

    found = hooks.rewrite(
        "[a](../README.md#x) [b](levels.md) [c](../LICENSE) ![d](images/text.png) [e](https://arxiv.org)\n"
        "```text\n[f](../LICENSE)\n```\n",
        "docs/data.md",
        "data.md",
    )
    assert found == (
        "[a](project.md#x) [b](levels.md) c ![d](images/text.png) [e](https://arxiv.org)\n"
        "```text\n[f](../LICENSE)\n```\n"
    )
    place = "derivations/memory_mlp.md"
    deep = hooks.rewrite("[g](../../../../docs/levels.md)", hooks.OUTSIDE[place], place)
    assert deep == "[g](../levels.md)"


@pytest.mark.thorough
@pytest.mark.skipif(find_spec("material") is None, reason="needs the extra docs")
def test_the_site_builds_strictly_and_is_whole(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-f", CONFIG, "-d", tmp_path],
        check=True,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in tmp_path.rglob("*.html")}
    assert len(pages) > 30
    for path, page in pages.items():
        assert [one for one in page.loads if one.startswith(("http:", "https:", "//"))] == [], path
        if path.name == "404.html":  # its links are from the root of a host
            continue
        for link in page.links:
            target, _, anchor = link.partition("#")
            if "://" in link or target.startswith(("mailto:", "/")):
                continue
            there = (path.parent / target).resolve() if target else path
            there = there / "index.html" if there.is_dir() else there
            assert there.is_file(), f"{path.name}: {link}"
            if anchor and there.suffix == ".html":
                assert anchor in pages[there].anchors, f"{path.name}: {link}"
