"""Pieces of HTML that reports are made of, beside those of `html.py`."""

from __future__ import annotations

from collections.abc import Sequence

from nested_learning.html import Markup, preformatted, text

STYLE = """
figure img { background: transparent }
@media (prefers-color-scheme: dark) { figure img { filter: invert(1) hue-rotate(180deg) } }
dl.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(13rem, 1fr)); gap: .6rem;
           margin: 1rem 0 }
dl.tiles div { background: var(--tint); border-radius: 6px; padding: .5rem .8rem }
dl.tiles dt { color: var(--soft); font-size: .85rem }
dl.tiles dd { margin: 0; font-size: 1.15rem; overflow-wrap: anywhere }
dl.tiles dd small { display: block; font-size: .8rem; line-height: 1.3 }
td { max-width: 30rem; overflow-wrap: break-word }
details { margin: .6rem 0 } summary { cursor: pointer; color: var(--soft) }
ul.plain { padding-left: 1.1rem; margin: .3rem 0 }
blockquote { margin: .3rem 0 1rem; padding: .3rem .9rem; border-left: 3px solid var(--line);
             white-space: pre-wrap; overflow-wrap: anywhere; max-height: 12rem; overflow-y: auto }
"""
"""Figures have black lines on no background; in the dark they are inverted, with their hues kept."""


def tiles(values: Sequence[tuple[str, str, str]]) -> Markup:
    """Numbers to see first: (what, value, a remark below it or "")."""
    made = [
        f"<div><dt>{text(what)}</dt><dd>{text(value)}"
        + (f"<small>{text(remark)}</small>" if remark else "")
        + "</dd></div>"
        for what, value, remark in values
    ]
    return Markup(f'<dl class="tiles">{"".join(made)}</dl>')


def folded(summary: str, content: str) -> Markup:
    """Text that is shown when its summary is clicked."""
    return Markup(f"<details><summary>{text(summary)}</summary>{preformatted(content)}</details>")


def bullets(lines: Sequence[str]) -> Markup:
    """A list."""
    return Markup('<ul class="plain">' + "".join(f"<li>{text(line)}</li>" for line in lines) + "</ul>")


def quotation(words: str) -> Markup:
    """A text as a model wrote it, with its line ends; what cannot be shown is replaced."""
    seen = "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in words)
    return Markup(f"<blockquote>{text(seen)}</blockquote>")


def count(number: int | None) -> str:
    """A large number for people: 950, 12.3 k, 1.40 M, 2.50 B."""
    if number is None:
        return "unknown"
    for size, unit in ((10**9, " B"), (10**6, " M"), (10**3, " k")):
        if number >= size:
            return f"{number / size:.3g}{unit}" if number < 100 * size else f"{number / size:.0f}{unit}"
    return str(number)


def duration(seconds: float | None) -> str:
    """A time for people: 41 s, 3 min 20 s, 5 h 02 min."""
    if seconds is None:
        return "unknown"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def number(value: float | None, digits: int = 4) -> str:
    """A number for a tile or a cell; "none yet" without one."""
    return "none yet" if value is None else f"{value:.{digits}f}"
