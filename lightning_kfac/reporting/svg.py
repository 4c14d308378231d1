"""Figures as SVG within a page: they take its ink and paper, and so suit light, dark and print."""

import io
import itertools
import re
from collections.abc import Mapping
from xml.etree import ElementTree

import matplotlib
from matplotlib.figure import Figure

from lightning_kfac.reporting.escape import as_html
from lightning_kfac.reporting.figures.style import AFTER, BEFORE

# What stands behind a legend; black and white are those of the page.
PAPER = "#fefefe"
OF_THE_PAGE = {"#000000": "currentColor", PAPER: "var(--paper)", BEFORE: "var(--before)", AFTER: "var(--after)"}
ELEMENTS = {"svg", "g", "path", "use", "defs", "clipPath", "rect", "text", "tspan", "image", "a", "circle"}
_numbers = itertools.count(1)


def svg(drawn: Figure, alt: str, tips: Mapping[str, str] | None = None) -> str:
    """A figure as an ``svg`` element, without scripts, styles or addresses.

    Args:
        alt: What it shows, for who does not see it.
        tips: What is shown of a link of the figure while a pointer is over it, by its target.
    """
    for axes in drawn.axes:
        _on_paper(axes.get_legend())
    for legend in drawn.legends:
        _on_paper(legend)
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        drawn.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    root = ElementTree.fromstring(buffer.getvalue())
    width = float(root.attrib["width"].removesuffix("pt"))
    size = f"min-width: {0.92 * width:.0f}px; max-width: {1.4 * width:.0f}px"
    own = f'class="drawn" role="img" aria-label="{as_html(alt)}" viewBox="{root.attrib["viewBox"]}" style="{size}"'
    prefix = f"f{next(_numbers)}-"
    inside = "".join(_element(child, prefix, tips or {}) for child in root)
    return f"<svg {own}>{inside}</svg>"


def _on_paper(legend: matplotlib.legend.Legend | None) -> None:
    if legend is not None:
        legend.get_frame().set_facecolor(PAPER)


def _element(element: ElementTree.Element, prefix: str, tips: Mapping[str, str]) -> str:
    """An element and what is in it; names that refer to each other are the figure's own."""
    name = element.tag.rpartition("}")[2]
    if name not in ELEMENTS:
        return ""
    attributes = {key.rpartition("}")[2]: value for key, value in element.attrib.items()}
    target = attributes.get("href", "") if name == "a" else ""
    written = "".join(f' {key}="{_value(key, value, prefix, bool(target))}"' for key, value in attributes.items())
    tip = f"<title>{as_html(tips[target.removeprefix('#')])}</title>" if target.removeprefix("#") in tips else ""
    inside = "".join(_element(child, prefix, tips) for child in element)
    return f"<{name}{written}>{tip}{as_html((element.text or '').strip())}{inside}</{name}>"


def _value(key: str, value: str, prefix: str, is_link: bool) -> str:
    if key == "id":
        return prefix + as_html(value)
    if key == "href" and not is_link:
        return as_html(f"#{prefix}{value[1:]}" if value.startswith("#") else value)
    value = value.replace("url(#", f"url(#{prefix}")
    if key in ("d", "transform", "x", "y", "width", "height", "points"):
        value = re.sub(r"(\.\d\d)\d+", r"\1", value).replace("\n", "")
    for ours, of_the_page in OF_THE_PAGE.items():
        value = value.replace(ours.lower(), of_the_page)
    return as_html(value)
