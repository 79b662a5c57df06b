"""An `Inspection` as one HTML page: the text with a heat map, curves over the writes, and tables."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from torch import Tensor

from nested_learning.html import Markup, page, picture, table
from nested_learning.inspection.trace import TOKEN_VALUES, Inspection, MemoryTrace
from nested_learning.report import new_figure

MOST = 4  # tokens named per memory
AROUND = 12  # characters of context on either side of a named token
SHARES = (0.02, 0.98)  # of the values, where the colours begin and end
NAMES = {"surprise": "surprise", "eta": "η", "alpha": "α", "contribution": "contribution"}
ASSETS = Path(__file__).parent


def inspection_page(inspection: Inspection, texts: Sequence[str], title: str, lead: str) -> str:
    """The page, which loads nothing and keeps all numbers inside.

    Args:
        inspection: what was seen.
        texts: of every token, see `token_texts`.
        title, lead: its heading, and a sentence below that.
    """
    blocks = sorted({memory.block for memory in inspection.memories})
    by_block = {n: [m for m in inspection.memories if m.block == n] for n in blocks}
    sections: list[tuple[str, Sequence[str | Markup]]] = [
        ("What every token did", [heat_map(inspection, texts)]),
        ("Memories", [MEMORIES_LEAD, memory_table(inspection.memories)]),
        ("Tokens that moved a memory most", [MOST_LEAD, most_table(inspection, texts)]),
    ]
    for number, memories in by_block.items():
        sections.append((f"Block {number}: write by write", curves(memories, number)))
    made = page(title, lead, sections, (ASSETS / "page.css").read_text(encoding="utf-8"))
    script = (ASSETS / "page.js").read_text(encoding="utf-8")
    return made.replace("</body>", f"<script>\n{script}</script>\n</body>")


MEMORIES_LEAD = (
    "Means over the text; norms are over all heads together. Change: of one write, relative to the memory's "
    "norm before it. Drift: distance from the initial weights, relative to their norm. A name shows its "
    "contributions in the text above."
)
MOST_LEAD = (
    "Norm of what the token has added to the memory when its chunk was written; a number shows it above."
)


def heat_map(inspection: Inspection, texts: Sequence[str]) -> Markup:
    """The text, the choice of what colours it, and the numbers behind."""
    plain = json.dumps(token_data(inspection), separators=(",", ":"), ensure_ascii=False)
    data = plain.replace("<", "\\u003c")  # a name such as </script> ends nothing
    loss = shares_of_scale(inspection.loss)[0]
    spans = "".join(span(i, word, loss[i]) for i, word in enumerate(texts))
    return Markup(
        '<div id="panel">\n<label>Colour: '
        f'<select id="memory">{choices(inspection.memories)}</select></label>\n'
        f'<span id="values" role="radiogroup">{radios()}</span>\n'
        '<span id="legend"><span id="low"></span><i></i><span id="high"></span></span>\n'
        '<div id="about" aria-live="polite">Point at a token to see its numbers.</div>\n</div>\n'
        f'<div id="text">{spans}</div>\n'
        f'<script type="application/json" id="data">{data}</script>'
    )


def token_data(inspection: Inspection) -> dict[str, Any]:
    """Numbers of every token, for the script: three digits of each."""
    memories: dict[str, Any] = {}
    for memory in inspection.memories:
        values = {name: memory.per_token(name) for name in TOKEN_VALUES}
        memories[memory.key] = {
            "label": memory.label,
            "ends": list(memory.ends),
            "values": {name: scaled(v) for name, v in values.items()},
        }
    return {"loss": scaled(inspection.loss), "memories": memories}


def scaled(values: Tensor) -> dict[str, Any]:
    """Numbers with the ends of their colour scale."""
    _, low, high = shares_of_scale(values)
    return {"low": low, "high": high, "of": [rounded(v) for v in values.tolist()]}


def rounded(value: float) -> float | None:
    """Three significant digits; more for what is close to 1, such as α. None for what is not finite."""
    if not math.isfinite(value):
        return None
    return float(f"{value:.6f}" if 0.99 < value < 1 else f"{value:.3g}")


def shares_of_scale(values: Tensor) -> tuple[list[float], float, float]:
    """Where every value lies on its colour scale, 0 to 1, and the values at the scale's ends."""
    known = values[values.isfinite()].double()
    if not len(known):
        return [0.0] * len(values), 0.0, 0.0
    low, high = (float(known.quantile(share)) for share in SHARES)
    width = high - low
    shares = [(v - low) / width if width > 0 and math.isfinite(v) else 0.0 for v in values.tolist()]
    return [min(max(share, 0.0), 1.0) for share in shares], low, high


def span(number: int, word: str, share: float) -> str:
    """One token of the text; a line end is shown, and ends the line."""
    shown = escape(word).replace("\n", "<b>↵</b>\n")
    return f'<span id="t{number}" style="--v:{share:.2f}">{shown}</span>'


def choices(memories: Sequence[MemoryTrace]) -> str:
    """The options of the choice of a memory."""
    parts = ['<option value="loss">loss of the language model</option>']
    for number in sorted({memory.block for memory in memories}):
        own = [memory for memory in memories if memory.block == number]
        options = "".join(f'<option value="{escape(m.key)}">{escape(m.label)}</option>' for m in own)
        parts.append(f'<optgroup label="block {number}">{options}</optgroup>')
    return "".join(parts)


def radios() -> str:
    """The choice of a number of a memory."""
    return "".join(
        f'<label><input type="radio" name="value" value="{name}"{" checked" * (name == "contribution")}> '
        f"{NAMES[name]}</label>"
        for name in TOKEN_VALUES
    )


def memory_table(memories: Sequence[MemoryTrace]) -> Markup:
    """One line per memory."""
    header = ["memory", "chunk", "writes", "surprise", "η", "α", "norm", "change", "drift", "effective rank"]
    return table(header, [memory_row(memory) for memory in memories])


def memory_row(memory: MemoryTrace) -> list[str | Markup]:
    """The line of one memory: means over its text."""
    key = quote(memory.key, safe="")
    norms, drift = memory.per_write_and_start("norm"), memory.per_write_and_start("drift")
    change = memory.per_write("relative_change")
    change = change[change.isfinite()]
    ranks = [
        f"{name} {rank[:, 0].mean():.1f} → {rank[:, -1].mean():.1f}" for name, rank in memory.rank.items()
    ]
    drifted = f"{float(drift[-1] / norms[0]):.2%}" if norms[0] > 0 else "from zero"
    writes = f"{len(memory.ends)}" + (f" ({sum(memory.resets)} resets)" if any(memory.resets) else "")
    return [
        Markup(f'<a href="#{key}/contribution">{escape(memory.label)}</a>'),
        str(memory.chunk),
        writes,
        f"{memory.per_token('surprise').mean():.3g}",
        f"{memory.eta.mean():.3g}",
        f"{memory.alpha.mean():.5f}",
        f"{norms[0]:.3g} → {norms[-1]:.3g}",
        f"{change.mean():.2%}" if len(change) else "–",
        drifted,
        ", ".join(ranks),
    ]


def most_table(inspection: Inspection, texts: Sequence[str]) -> Markup:
    """The tokens of largest contribution to every memory, with their surroundings."""
    rows: list[list[str | Markup]] = []
    for memory in inspection.memories:
        values = memory.per_token("contribution")
        places, key = memory.most_moving(MOST), quote(memory.key, safe="")
        cells = [
            Markup(
                f'<a class="place" href="#{key}/contribution/{t}">{values[t]:.3g}</a> {in_context(texts, t)}'
            )
            for t in places
        ]
        rows.append([memory.label, *cells, *[""] * (MOST - len(cells))])
    return Markup(f'<div id="most">{table(["memory", *[f"{n}." for n in range(1, MOST + 1)]], rows)}</div>')


def in_context(texts: Sequence[str], place: int) -> Markup:
    """A token marked in its surroundings, in one line."""
    before, after = "".join(texts[max(0, place - AROUND) : place]), "".join(texts[place + 1 :][:AROUND])
    parts = [part.replace("\n", "↵") for part in (before[-AROUND:], texts[place], after[:AROUND])]
    left, token, right = map(escape, parts)
    return Markup(f"<code>{left}<mark>{token}</mark>{right}</code>")


def curves(memories: Sequence[MemoryTrace], block: int) -> list[str | Markup]:
    """Figures of what changes from write to write."""
    figure = new_figure(11, 6)
    panels = figure.subplots(2, 3).flatten()
    titles = ("change / norm", "drift / initial norm", "effective rank", "η", "α", "surprise")
    for axes, title in zip(panels, titles, strict=True):
        axes.set_title(title, fontsize="medium")
        axes.grid(alpha=0.25)
        axes.ticklabel_format(useOffset=False)
    for axes in panels[3:]:
        axes.set_xlabel("tokens read")
    for number, memory in enumerate(memories):
        draw_memory(panels, memory, f"C{number % 10}")
    figure.legend(*panels[3].get_legend_handles_labels(), loc="outside lower center", ncols=8)
    return [
        picture(
            figure,
            f"Block {block}, over the tokens read when a memory was written. Effective rank: solid W1 or W, "
            "dashed W2, mean over heads. η, α and surprise are means over the chunk; memories that are "
            "written together share η and α, so that their lines coincide. A memory that starts at zero has "
            "its drift as it is.",
            dpi=100,
        )
    ]


def draw_memory(panels: Sequence[Any], memory: MemoryTrace, colour: str) -> None:
    """The six curves of one memory."""
    ends, starts = list(memory.ends), [0, *memory.ends]
    norm = float(memory.per_write_and_start("norm")[0])
    style: dict[str, Any] = {"color": colour, "marker": "." if len(ends) < 20 else "", "linewidth": 1.4}
    panels[0].plot(ends, memory.per_write("relative_change").tolist(), **style)
    panels[1].plot(starts, [d / (norm or 1.0) for d in memory.per_write_and_start("drift").tolist()], **style)
    for name, rank in memory.rank.items():
        panels[2].plot(starts, rank.mean(0).tolist(), linestyle="--" if name == "W2" else "-", **style)
    panels[3].plot(ends, memory.per_write("eta").tolist(), label=memory.symbol, **style)
    panels[4].plot(ends, memory.per_write("alpha").tolist(), **style)
    surprise = memory.per_token("surprise")
    means = [float(surprise[a:b].mean()) for a, b in zip(starts[:-1], ends, strict=True)]
    panels[5].plot(ends, means, **style)
