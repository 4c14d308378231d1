"""Abilities as a person reads them."""

import io

from lightning_kfac.console import PlainConsole
from lightning_kfac.reporting.abilities import abilities_section, abilities_table, ability_lines, correlation_line
from lightning_kfac.reporting.figures.abilities import abilities_figure


def record(name, group, retention=(0.5, 0.4, 0.6), **changes):
    about = {"name": name, "group": group, "metric": "choice", "source": "built-in", "n": 1319, "chance": 0.25}
    figures = {"unedited": [0.9, 0.85, 0.95], "edited": [0.45, None, None], "retention": retention, "p": 0.0001}
    return {**about, **figures, "lost": 3, "gained": 1, "at_chance": False, **changes}


TASKS = [
    record("winogrande<b>", "logic"),
    record("brackets", "logic", p=0.25),
    record("closed_book", "closed-book", at_chance=True, chance=None),
    record("gsm8k", "arithmetic", None, p=None, at_chance=True),
]
GROUPS = [record("logic", "logic", None), record("closed-book", "closed-book"), record("arithmetic", "arithmetic")]
FOUND = {"tasks": TASKS, "groups": GROUPS, "low_shares": {}, "correlation": None}


def test_tasks_stand_below_their_groups():
    lines = dict(ability_lines(FOUND | {"groups": [record("logic", "logic"), *GROUPS[1:]]}))
    assert list(lines) == ["logic", "- winogrande<b>", "- brackets", "closed_book", "arithmetic: gsm8k"]
    assert [cell.text for cell in lines["- brackets"]] == ["1,319", "0.25", "0.90", "0.45", "50%", "0.250"]
    assert lines["- brackets"][4].bounds == "40% to 60%" and lines["- brackets"][3].bounds == "?-?"
    assert lines["closed_book"][1].text == "" and lines["closed_book"][4].text == "at chance"
    assert [cell.text for cell in lines["arithmetic: gsm8k"][4:]] == ["at chance", "n/a"]
    assert lines["- winogrande<b>"][5].text == "<.001"


def test_the_table_is_as_wide_as_a_terminal():
    console = PlainConsole(width=80, record=True, file=io.StringIO())
    console.print(abilities_table(FOUND | {"groups": [record("logic", "logic"), *GROUPS[1:]]}))
    shown = console.export_text()
    assert "…" not in shown and max(len(line.rstrip()) for line in shown.splitlines()) <= 80
    assert "40% to 60%" in shown and "winogrande<b>" in shown


def test_the_section_escapes_and_says_what_the_columns_mean():
    found = FOUND | {"groups": [record("logic", "logic"), *GROUPS[1:]]}
    page = abilities_section(found)
    assert "winogrande&lt;b&gt;" in page and "<b>" not in page and "McNemar" in page and "<img" in page
    assert abilities_section({}) == ""


def test_bars():
    figure = abilities_figure({"tasks": TASKS, "groups": GROUPS})
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == [task["name"] for task in TASKS]
    assert [bar.get_width() for bar in axes.patches] == [0.5, 0.5, 0.5, 0.0]
    assert [bar.get_facecolor()[3] for bar in axes.patches] == [1, 1, 0, 0]


def test_the_correlation_in_words():
    shares = {"low_shares": {"brackets": 0.2}}
    assert correlation_line(FOUND) == ""
    assert "not measured, fewer than four" in correlation_line(FOUND | shares)
    known = {"correlation": {"value": [0.5, -0.25, 0.75], "tasks": ["a", "b", "c", "d"]}}
    assert correlation_line(FOUND | shares | known).endswith("+0.50 [-0.25, +0.75], 4 tasks.")
    lonely = {"correlation": {"value": [0.5, None, None], "tasks": ["a", "b", "c"]}}
    assert "no interval" in correlation_line(FOUND | shares | lonely)
