"""Pages that need nothing else: one HTML file with its style, tables and figures inside.

`nl inspect` and `nl report` write them. Text is escaped here, so that callers pass plain strings; a `Markup`
is HTML already and goes in as it is.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from typing import Any

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #ffffff; --line: #d5d9de;
        --soft: #5b6470; --tint: #f4f6f8 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e7eb; --paper: #15181c; --line: #363c44; --soft: #9aa4b0; --tint: #1e2329 }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
       max-width: 72rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.6rem; margin: 0 0 .3rem } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem }
p.lead, figcaption, small { color: var(--soft) }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; display: block; overflow-x: auto }
th, td { padding: .2rem .7rem; border-bottom: 1px solid var(--line); text-align: right }
th:first-child, td:first-child { text-align: left }
figure { margin: 1rem 0 } figure img { max-width: 100%; background: #fff; border-radius: 4px }
pre { background: var(--tint); padding: .7rem; overflow-x: auto; white-space: pre-wrap }
"""


class Markup(str):
    """A string that is HTML already."""


def text(value: str | Markup) -> str:
    """`value` as HTML: escaped, unless it is a `Markup`."""
    return value if isinstance(value, Markup) else escape(value)


def page(
    title: str, lead: str, sections: Sequence[tuple[str, Sequence[str | Markup]]], style: str = ""
) -> str:
    """A whole HTML document that loads nothing.

    Args:
        lead: a sentence below the title.
        sections: a heading and what stands below it; plain strings become paragraphs.
        style: more CSS.
    """
    parts = []
    for heading, blocks in sections:
        inner = "\n".join(block if isinstance(block, Markup) else f"<p>{text(block)}</p>" for block in blocks)
        parts.append(f"<section>\n<h2>{text(heading)}</h2>\n{inner}\n</section>")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{text(title)}</title>\n<style>{STYLE}{style}</style>\n</head>\n<body>\n"
        f'<h1>{text(title)}</h1>\n<p class="lead">{text(lead)}</p>\n'
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def table(header: Sequence[str], rows: Sequence[Sequence[str | Markup]]) -> Markup:
    """A table; the first column is aligned to the left, the others to the right.

    Raises:
        ValueError: a row with more or fewer cells than the header.
    """
    for row in rows:
        if len(row) != len(header):
            raise ValueError(f"a row has {len(row)} cells, the header has {len(header)}: {list(row)}")
    head = "".join(f"<th>{text(cell)}</th>" for cell in header)
    body = "\n".join("<tr>" + "".join(f"<td>{text(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return Markup(f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>")


def picture(figure: Any, caption: str, dpi: int = 120) -> Markup:
    """A matplotlib figure inside the page, as PNG; the caption is also what a screen reader says."""
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=dpi)
    source = base64.b64encode(data.getvalue()).decode("ascii")
    words = escape(caption)
    image = f'<img alt="{words}" src="data:image/png;base64,{source}">'
    return Markup(f"<figure>\n{image}\n<figcaption>{words}</figcaption>\n</figure>")


def preformatted(value: str) -> Markup:
    """Text that keeps its spaces and line ends."""
    return Markup(f"<pre>{escape(value)}</pre>")
