"""Figures within a page: its colours, names of their own, and nothing that acts."""

import re

import pytest
from matplotlib.figure import Figure

from lightning_kfac.reporting.escape import as_label
from lightning_kfac.reporting.figures.pareto import pareto_figure
from lightning_kfac.reporting.figures.style import AFTER, BEFORE, new_figure
from lightning_kfac.reporting.svg import ELEMENTS, svg
from tests.reporting.pages import BEFORE as UNEDITED
from tests.reporting.pages import EDIT
from tests.reporting.test_escape import NAME, Tags
from tests.test_console import HOSTILE


def drawn(title="a figure", label="a line") -> Figure:
    figure = new_figure(4, 3)
    axes = figure.add_subplot()
    axes.plot([0, 1], [0, 1], color=BEFORE, label=label)
    axes.plot([0, 1], [1, 0], "o", color=AFTER)
    axes.plot([0, 1], [1, 1], color="#000000")
    axes.imshow([[0, 1], [1, 0]], extent=(0, 1, 0, 1))
    axes.set_title(title)
    axes.legend()
    return figure


def test_the_colours_are_those_of_the_page():
    text = svg(drawn(), "what it shows")
    for colour in ("currentColor", "var(--before)", "var(--after)", "var(--paper)"):
        assert colour in text
    assert "#000000" not in text and BEFORE.lower() not in text and AFTER.lower() not in text
    assert all("opacity: 0" in style for style in re.findall(r'style="([^"]*fill: #ffffff[^"]*)"', text))
    assert 'aria-label="what it shows"' in text and 'role="img"' in text
    assert "http" not in text and "<style" not in text and "<metadata" not in text and "<!--" not in text


def test_two_figures_share_no_names():
    one, other = svg(drawn(), "one"), svg(drawn(), "other")
    ids = [set(re.findall(r' id="([^"]+)"', text)) for text in (one, other)]
    assert ids[0] and not ids[0] & ids[1]
    for text, own in zip((one, other), ids, strict=True):
        used = {*re.findall(r'href="#([^"]+)"', text), *re.findall(r"url\(#([^)]+)\)", text)}
        assert used and used <= own


@pytest.mark.parametrize("name", [NAME, HOSTILE, "</text></svg><script>x()</script>", "a & b < c --> d"])
def test_no_name_is_markup(name):
    text = svg(drawn(as_label(name), as_label(name)), name)
    assert set(Tags(text).tags) <= {name.lower() for name in ELEMENTS}
    assert not set("\x1b\x07\u202e") & set(text)


def test_points_of_a_sweep_lead_to_their_edits():
    """Each with what it says; the unedited model leads nowhere."""
    edits = [UNEDITED | {"edit": EDIT | {"rho": rho}, "strict_acc": rho - 0.5} for rho in (0.6, 0.8)]
    rows = [UNEDITED | {"edit": None}, *edits]
    links = {1: "#edit-1", 2: "#edit-2"}
    text = svg(pareto_figure(rows, "x", links), "x", {"edit-1": 'say "<1>"', "edit-2": "two"})
    targets = re.findall(r'<a href="(#[^"]+)"[^>]*><title>([^<]*)</title>', text)
    assert targets == [("#edit-1", "say &quot;&lt;1&gt;&quot;"), ("#edit-2", "two")]
    assert ">0.6</text>" in text and ">0.8</text>" in text and ">better</text>" in text and ">unedited</text>" in text
