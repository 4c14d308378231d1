"""Parts of a self-contained HTML page: everything is in the file, nothing is fetched."""

import base64
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from lightning_kfac.reporting.escape import as_html
from lightning_kfac.reporting.style_sheet import STYLE
from lightning_kfac.reporting.svg import svg


def page(title: str, sections: Iterable[str]) -> str:
    """The whole document."""
    body = "\n".join(section for section in sections if section)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{as_html(title)}</title>'
        f"<style>{STYLE}</style></head>\n<body>\n<h1>{as_html(title)}</h1>\n{body}\n</body></html>\n"
    )


def section(title: str, *parts: str) -> str:
    """A heading and what stands under it; nothing where that is empty."""
    parts = tuple(part for part in parts if part)
    return f"<h2>{as_html(title)}</h2>\n" + "\n".join(parts) if parts else ""


def paragraph(text: str, note: bool = False, lead: bool = False) -> str:
    """A paragraph of plain text; ``lead`` is the answer that a page begins with."""
    kind = " class=note" if note else " class=lead" if lead else ""
    return f"<p{kind}>{as_html(text)}</p>"


def bullets(texts: Sequence[str]) -> str:
    """A list of plain texts."""
    return "<ul>" + "".join(f"<li>{as_html(text)}</li>" for text in texts) + "</ul>" if texts else ""


def preformatted(text: str) -> str:
    """Text as it is."""
    return f"<pre>{as_html(text)}</pre>"


def table(header: Sequence[str], rows: Iterable[Sequence[str]], stacked: bool = False) -> str:
    """A table of plain texts; cells that are ``Html`` stand as they are.

    Args:
        stacked: Intervals stand below their figures, as on a narrow screen.
    """
    head = "".join(f"<th>{_cell(name)}</th>" for name in header)
    body = "".join("<tr>" + "".join(f"<td>{_cell(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    kind = ' class="stacked"' if stacked else ""
    return f'<div class="scroll"><table{kind}><tr>{head}</tr>{body}</table></div>'


class Html(str):
    """Text that is HTML already."""


def big(figures: Sequence[tuple[str, str]]) -> str:
    """A few large figures side by side, each with what it says."""
    cells = "".join(f"<div><b>{as_html(value)}</b><span>{as_html(text)}</span></div>" for value, text in figures)
    return f'<div class="figures">{cells}</div>' if cells else ""


def details(summary: str, *parts: str, name: str = "") -> str:
    """What is shown when somebody asks for it; a link to ``name`` opens it."""
    inside = "".join(parts)
    anchor = f'<div id="{as_html(name)}">{inside}</div>' if name else inside
    return f"<details><summary>{as_html(summary)}</summary>{anchor}</details>"


def described(pairs: Mapping[str, str]) -> str:
    """A list of names and what they say; texts that are ``Html`` stand as they are."""
    return "<dl>" + "".join(f"<dt>{as_html(name)}</dt><dd>{_cell(text)}</dd>" for name, text in pairs.items()) + "</dl>"


def figure(drawn: Figure, alt: str, tips: Mapping[str, str] | None = None) -> str:
    """A figure in the page's own colours, with what it shows below it."""
    return _framed(svg(drawn, alt, tips), alt)


def image(png: bytes, alt: str) -> str:
    """A PNG image, embedded."""
    data = base64.b64encode(png).decode()
    return _framed(f'<img alt="{as_html(alt)}" src="data:image/png;base64,{data}">', alt)


def _framed(drawn: str, alt: str) -> str:
    return f'<figure><div class="scroll">{drawn}</div><figcaption>{as_html(alt)}</figcaption></figure>'


def _cell(cell: str) -> str:
    return cell if isinstance(cell, Html) else as_html(cell)


def as_figure(text: str) -> str:
    """A figure and its interval, ``0.92 [0.90, 0.94]``, the interval set apart."""
    value, bracket, bounds = text.partition(" [")
    if not bracket or bounds == "n/a]":
        return text
    return Html(f'{as_html(value)} <span class="interval">[{as_html(bounds)}</span>')


def sampling(scheme: Mapping[str, Any]) -> str:
    """How tokens are drawn, in words: ``temperature 1.0, top-k 40, top-p 1.0``."""
    top_k = scheme.get("top_k")
    likeliest = "all tokens" if top_k is None else f"top-k {top_k}"
    return f"temperature {scheme.get('temperature')}, {likeliest}, top-p {scheme.get('top_p')}"
