"""mkdocs hooks: pages that stand outside of docs/, and links that lead to them.

Pages are written for the repository, where a link is a path from page to file. In the site a link to a page
leads to that page, and one to any other file of the repository keeps its words only.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
OUTSIDE = {
    "project.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "derivations/memory_mlp.md": "src/nested_learning/ops/memory_mlp/README.md",
    "derivations/self_modifying_linear.md": "src/nested_learning/ops/self_modifying_linear/README.md",
}
"""Place in the site → file of the repository."""
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#]*)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages of `OUTSIDE`."""
    for place, source in OUTSIDE.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, place, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Make the links of a page lead where they lead in the repository."""
    place = page.file.src_uri
    source = OUTSIDE.get(place, f"docs/{place}")
    return rewrite(markdown, source, place)


def rewrite(markdown: str, source: str, place: str) -> str:
    """Links of the file `source` of the repository, for the page `place` of the site. Code stays as it is."""
    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.MULTILINE | re.DOTALL)
    return "".join(part if part.startswith("```") else _links(part, source, place) for part in parts)


def _links(text: str, source: str, place: str) -> str:
    def replace(found: re.Match[str]) -> str:
        picture, words, target, anchor = found.groups()
        if not target or re.match(r"\w+:", target):
            return found.group()
        led = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        there = page_of(led)
        if there is None:
            return words
        way = posixpath.relpath(there, posixpath.dirname(place) or ".")
        return f"{picture}[{words}]({way}{anchor or ''})"

    return LINK.sub(replace, text)


def page_of(path: str) -> str | None:
    """The place in the site of a file of the repository; None if it has none."""
    for place, source in OUTSIDE.items():
        if path == source:
            return place
    return path.removeprefix("docs/") if path.startswith("docs/") else None
