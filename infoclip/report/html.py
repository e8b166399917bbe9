"""One HTML file with everything in it: pictures as data, charts as SVG, no script and nothing from the network.

Every text that goes in is escaped; only what this package draws (SVG, pictures) is taken as markup. The page follows
the reader's light or dark setting and the width of the window.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, NewType
from urllib.parse import quote

import numpy as np

from infoclip.report.palette import hex_color, palette

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL import Image

__all__ = ["Cell", "Markup", "Page", "chip", "figure", "picture"]

Markup = NewType("Markup", str)
"""Text that is HTML already; everything else is escaped."""

_STYLE = """
:root { color-scheme: light dark; --ground: #fbfbfa; --card: #ffffff; --ink: #1d2127; --soft: #626a75;
  --line: #dfe2e6; --mark: #e8f5ef; --accent: #0b7a55; --wrong: #a4480c; }
@media (prefers-color-scheme: dark) { :root { --ground: #15181c; --card: #1d2126; --ink: #e7e9ec; --soft: #9aa3ae;
  --line: #343a42; --mark: #173429; --accent: #4fd1a1;
  --wrong: #f0a06a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 2rem 1.2rem 4rem; background: var(--ground); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .4rem; }
h2 { font-size: 1.3rem; margin: 2.6rem 0 .6rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 .4rem; }
p { margin: .5rem 0; max-width: 50rem; }
.lead { font-size: 1.08rem; }
.soft, figcaption, .note { color: var(--soft); font-size: .86rem; }
code, pre { font: .86rem/1.5 ui-monospace, SFMono-Regular, Menlo, "DejaVu Sans Mono", monospace; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .8rem 1rem;
  overflow-x: auto; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; background: var(--card); font-variant-numeric: tabular-nums; }
th, td { padding: .45rem .9rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th { color: var(--soft); font-weight: 600; font-size: .86rem; }
th:first-child, td:first-child { text-align: left; }
td.best { background: var(--mark); color: var(--accent); font-weight: 650; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(27rem, 100%), 1fr)); gap: 1rem; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: .7rem; padding: .9rem 1rem; }
.card h3 { margin-top: 0; }
.chart { width: 100%; height: auto; display: block; }
.row { display: grid; grid-template-columns: repeat(var(--columns), minmax(5.2rem, 1fr)); gap: .5rem; }
.row figure { margin: 0; }
.row img { width: 100%; height: auto; display: block; border-radius: .3rem; }
.pixels { image-rendering: pixelated; }
figcaption { margin-top: .25rem; line-height: 1.3; }
.panel { margin: 0 0 1rem; }
.chips { display: flex; flex-wrap: wrap; gap: .3rem .8rem; margin: .6rem 0 0; font-size: .86rem; }
.chip { display: inline-flex; align-items: center; gap: .4rem; }
.chip i { width: 1rem; height: 1rem; border-radius: .25rem; border: 1px solid rgba(128, 128, 128, .6); flex: none; }
.chip b { font-weight: 600; color: var(--accent); }
.chip s { text-decoration: none; color: var(--wrong); }
.card.small { max-width: 42rem; }
.stack { display: flex; width: 26rem; max-width: 100%; height: 1.1rem; border-radius: .25rem; overflow: hidden;
  background: var(--line); }
.stack i { height: 100%; border-right: 1px solid var(--card); }
.sorts { margin: .6rem 0; font-size: .9rem; }
.sorts input { margin-right: .3rem; }
.sorts label { margin-right: 1rem; cursor: pointer; }
.classes { width: 100%; table-layout: fixed; }
.classes tbody { display: flex; flex-direction: column; }
.classes tr { display: grid; grid-template-columns: minmax(8rem, 1.4fr) 4.5rem minmax(6rem, 1fr) 4.4rem 4.4rem 7.5rem;
  align-items: center; }
.classes th, .classes td { padding: .22rem .6rem; min-width: 0; overflow: hidden; text-overflow: ellipsis;
  border-bottom: 0; }
.classes tbody tr { border-bottom: 1px solid var(--line); }
.classes td .stack { width: 100%; height: .8rem; }
.classes td .stack i { background: var(--accent); border: 0; }
details { margin: .8rem 0; }
summary { cursor: pointer; color: var(--soft); }
@media print { body { max-width: none; } .panel, .card { break-inside: avoid; } }
"""


class Cell(str):
    """A table cell's text; ``best`` marks it."""

    best: bool

    def __new__(cls, value: str, best: bool = False) -> Cell:
        cell = super().__new__(cls, value)
        cell.best = best
        return cell


class Page:
    """A report, built from the top down; :meth:`render` gives the file's text."""

    def __init__(self, title: str) -> None:
        self.title = title
        self._parts: list[str] = [f"<h1>{html.escape(title)}</h1>"]

    def heading(self, value: str) -> None:
        self._parts.append(f"<h2>{html.escape(value)}</h2>")

    def paragraph(self, value: str, kind: str = "") -> None:
        """A paragraph; ``kind`` is ``lead``, ``soft`` or nothing."""
        self._parts.append(f'<p class="{html.escape(kind)}">{html.escape(value)}</p>')

    def code(self, value: str) -> None:
        self._parts.append(f"<pre>{html.escape(value)}</pre>")

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        self._parts.append(_table(header, rows))

    def markup(self, value: Markup) -> None:
        """What this package has drawn, as it is."""
        self._parts.append(value)

    def links(self, links: Sequence[tuple[str, str]]) -> None:
        """Names and the files beside this page that they lead to."""
        inner = " · ".join(f'<a href="{html.escape(quote(to))}">{html.escape(name)}</a>' for name, to in links)
        self._parts.append(f"<p>{inner}</p>")

    def cards(self, cards: Sequence[tuple[str, Markup, str]]) -> None:
        """Charts side by side: title, content and a note each."""
        inner = "".join(
            f'<div class="card"><h3>{html.escape(title)}</h3>{content}<p class="note">{html.escape(note)}</p></div>'
            for title, content, note in cards
        )
        self._parts.append(f'<div class="cards">{inner}</div>')

    def panel(
        self, title: str, figures: Sequence[Markup], chips: Sequence[Markup] = (), columns: int = 0, small: bool = False
    ) -> None:
        """Pictures with a legend beneath; ``columns`` a row, by default all in one; ``small`` ones stay narrow."""
        legend = f'<div class="chips">{"".join(chips)}</div>' if chips else ""
        heading = f"<h3>{html.escape(title)}</h3>" if title else ""
        self._parts.append(
            f'<div class="card panel{" small" * small}">{heading}<div class="wide"><div class="row" style="--columns: '
            f'{columns or max(1, len(figures))}">{"".join(figures)}</div></div>{legend}</div>'
        )

    def details(self, summary: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table that opens on a click."""
        self._parts.append(f"<details><summary>{html.escape(summary)}</summary>{_table(header, rows)}</details>")

    def details_code(self, summary: str, value: str) -> None:
        """Text that opens on a click."""
        self._parts.append(
            f"<details><summary>{html.escape(summary)}</summary><pre>{html.escape(value)}</pre></details>"
        )

    def render(self) -> str:
        """The whole page."""
        return (
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            # Nothing may be fetched, whatever ends up in the page.
            '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
            "style-src 'unsafe-inline'\">\n"
            f"<title>{html.escape(self.title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
            + "\n".join(self._parts)
            + "\n</body>\n</html>\n"
        )


def picture(image: Image.Image | NDArray[np.uint8], alt: str, pixelated: bool = True) -> Markup:
    """A picture as an ``<img>`` with its data inside: PNG with visible pixels, or (a photograph) JPEG."""
    from PIL import Image

    buffer = io.BytesIO()
    drawn = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    if pixelated:
        drawn.save(buffer, format="PNG", optimize=True)
    else:
        drawn.convert("RGB").save(buffer, format="JPEG", quality=88)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    kind, form = (' class="pixels"', "png") if pixelated else ("", "jpeg")
    return Markup(f'<img{kind} alt="{html.escape(alt)}" src="data:image/{form};base64,{data}">')


def figure(image: Image.Image | NDArray[np.uint8], title: str, note: str = "", pixelated: bool = True) -> Markup:
    """A picture with its title and a softer note below."""
    caption = html.escape(title) + (f"<br>{html.escape(note)}" if note else "")
    return Markup(f"<figure>{picture(image, title, pixelated)}<figcaption>{caption}</figcaption></figure>")


def chip(name: str, index: int, mark: str = "", wrong: bool = False) -> Markup:
    """A legend's entry: the colour of a class index, its name, and a mark such as "unseen"; ``wrong`` marks a fault."""
    color = hex_color(palette(index + 1)[-1])
    tag = "s" if wrong else "b"
    extra = f" <{tag}>{html.escape(mark)}</{tag}>" if mark else ""
    return Markup(f'<span class="chip"><i style="background: {color}"></i>{html.escape(name)}{extra}</span>')


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in header)
    body = "".join("<tr>" + "".join(_cell(value) for value in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(value: str) -> str:
    best = ' class="best"' if isinstance(value, Cell) and value.best else ""
    return f"<td{best}>{html.escape(value)}</td>"
