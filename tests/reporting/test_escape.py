"""Names with markup in pages, Markdown and figures."""

import re
import warnings
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib.text import Text

from lightning_kfac.factors.spectra import layer_spectrum
from lightning_kfac.math.bands import Bands
from lightning_kfac.reporting.escape import as_html, as_label, as_markdown
from lightning_kfac.reporting.figures.bands import bands_figure, ratios_figure
from lightning_kfac.reporting.figures.comparison import extraction_figure
from lightning_kfac.reporting.figures.pareto import pareto_figure
from lightning_kfac.reporting.page import bullets, page, paragraph, preformatted, section, table
from lightning_kfac.reporting.spectra_board import spectra_markdown
from lightning_kfac.reporting.tables import Example, comparison_table, examples_markdown
from tests.test_console import HOSTILE, SHOWN, printed

NAME = '"><script>alert(1)</script>' + HOSTILE + "| $\\frac$ $x$ **b**"


class Tags(HTMLParser):
    """The tags and the text of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)

    def handle_data(self, data):
        self.text += data


def test_no_name_is_html():
    parts = paragraph(NAME), bullets([NAME]), preformatted(NAME), table([NAME], [[NAME]])
    found = Tags(page(NAME, [section(NAME, *parts)]))
    assert "script" not in found.tags and found.tags.count("td") == 1
    assert found.text.count("<script>alert(1)</script>") == 8
    assert not set("\x1b\x07\x9b\u202e\u2066") & set(found.text) and "\\x1b[2J" in found.text
    assert as_html("a\n\tb") == "a\n\tb"


def test_no_name_is_markdown():
    shown = as_markdown(NAME)
    assert re.sub(r"\\(.)", r"\1", shown.replace("\\\\", "\0")).replace("\0", "\\") == NAME.replace(HOSTILE, SHOWN)
    assert not re.search(r"(?<!\\)(\\\\)*[|*<>\[`_]", shown)
    example = Example(NAME, NAME, NAME, NAME)
    assert not set("\x1b\x07\u202e") & set(examples_markdown([example]))
    layer = layer_spectrum(np_tensor([2.0, 1.0]), np_tensor([3.0, 1.0]))
    lines = spectra_markdown({NAME: layer}).splitlines()
    assert len(lines) == 3 and len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1


def np_tensor(values):
    import torch

    return torch.tensor(values, dtype=torch.float64)


def test_no_name_in_a_table_is_markup():
    record = {f"{HOSTILE}/n_sequences": 3, f"{HOSTILE}/strict_acc": 0.5, "intervals": {}}
    shown = printed(comparison_table({"baseline": record, HOSTILE: record}), width=900)
    assert shown.count(SHOWN) == 2 and "\x1b" not in shown


@pytest.mark.parametrize("name", ["$\\frac$", "$x$", "$", "a$b", "_hidden", "\x1b[2J"])
def test_no_name_in_a_figure_is_mathematics(name):
    """A broken formula would end the drawing, and a sound one would be set as such."""
    values = np.array([1.0, 2.0])
    bands = {name: Bands(values, values, values), "other": Bands(values, values, values)}
    edit = {"formula": "original", "mode": "suppress", "alpha": {name: 0.5}, "mix": "scores", "basis": "general"}
    rows = [{"edit": {**edit, "blocks": [1], "projections": ["up"], "rho": 0.5}, "strict_acc": 0.1, "perplexity": 9.0}]
    figures = bands_figure(name, bands, bands, name), ratios_figure(name, name, bands), pareto_figure(rows, name)
    curve = {name: {name: [0.1, 0.2]}}
    figures = *figures, extraction_figure([1, 10], curve, {name: {}})
    expected = as_label(name).replace("\\$", "$").strip()
    for figure in figures:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # of glyphs that no font has
            figure.canvas.draw()
        texts = [text for text in figure.findobj(Text) if expected in text.get_text().replace("\\$", "$")]
        assert texts and not any(text._preprocess_math(text.get_text())[1] for text in texts)
    legend = [text.get_text().strip() for text in figures[0].axes[0].get_legend().get_texts()]
    assert len(legend) == 2
