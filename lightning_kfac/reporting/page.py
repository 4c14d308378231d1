"""Parts of a self-contained HTML page: everything is in the file, nothing is fetched."""

import base64
import io
from collections.abc import Iterable, Sequence

from matplotlib.figure import Figure

from lightning_kfac.reporting.escape import as_html

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1b1b1b; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: 0; } h1, li, blockquote { overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin-top: 2.2rem; border-bottom: 1px solid #ccc; }
table { border-collapse: collapse; margin: .6rem 0; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .2rem .7rem; border-bottom: 1px solid #e4e4e4; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } th { background: #f4f4f4; }
.scroll { overflow-x: auto; } img { max-width: 100%; margin: .4rem 0; }
pre { background: #f6f6f6; padding: .7rem; overflow-x: auto; font-size: 12.5px; }
.interval, .note { color: #666; font-size: 12.5px; } blockquote { margin: .2rem 0 .8rem 0; color: #333; }
mark { background: #ffe2c7; }
@media (max-width: 40rem) { th:first-child, td:first-child { white-space: normal; min-width: 7rem; } }
"""


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


def paragraph(text: str, note: bool = False) -> str:
    """A paragraph of plain text."""
    return f"<p{' class=note' if note else ''}>{as_html(text)}</p>"


def bullets(texts: Sequence[str]) -> str:
    """A list of plain texts."""
    return "<ul>" + "".join(f"<li>{as_html(text)}</li>" for text in texts) + "</ul>" if texts else ""


def preformatted(text: str) -> str:
    """Text as it is."""
    return f"<pre>{as_html(text)}</pre>"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of plain texts; cells that are ``Html`` stand as they are."""
    head = "".join(f"<th>{_cell(name)}</th>" for name in header)
    body = "".join("<tr>" + "".join(f"<td>{_cell(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


class Html(str):
    """Text that is HTML already."""


def figure(drawn: Figure, alt: str) -> str:
    """A figure, embedded as PNG."""
    buffer = io.BytesIO()
    drawn.savefig(buffer, format="png", dpi=110)
    return image(buffer.getvalue(), alt)


def image(png: bytes, alt: str) -> str:
    """A PNG image, embedded."""
    return f'<img alt="{as_html(alt)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def _cell(cell: str) -> str:
    return cell if isinstance(cell, Html) else as_html(cell)
