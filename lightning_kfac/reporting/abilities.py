"""What an edit leaves of each ability, as a person reads it: ``abilities.json`` in, cells and a section out."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from lightning_kfac.console import literal
from lightning_kfac.reporting.attacks import Cell
from lightning_kfac.reporting.escape import as_html
from lightning_kfac.reporting.figures.abilities import abilities_figure
from lightning_kfac.reporting.page import Html, figure, paragraph, section, table

Record = Mapping[str, Any]
TITLE = "What is left of each ability, on the same questions, with 95 % intervals"
HEADER = ("task", "n", "chance", "unedited", "edited", "kept", "p")
AT_CHANCE = "at chance"


def ability_lines(found: Mapping[str, Sequence[Record]]) -> list[tuple[str, tuple[Cell, ...]]]:
    """Each task below its group: the cells of ``HEADER`` but for the first.

    Args:
        found: ``tasks`` and ``groups`` of ``abilities.json``. A group of one task has no line of its own.
    """
    lines = []
    for group in found["groups"]:
        tasks = [task for task in found["tasks"] if task["group"] == group["name"]]
        if len(tasks) > 1:
            lines.append((group["name"], _cells(group)))
        lines += [(_named(task, len(tasks) == 1), _cells(task)) for task in tasks]
    return lines


def _named(task: Record, alone: bool) -> str:
    """A task below its group, or one that stands for it, with the group where the name does not say it."""
    name, group = task["name"], task["group"]
    if not alone:
        return f"- {name}"
    return name if name.replace("_", "-") == group else f"{group}: {name}"


def _cells(record: Record) -> tuple[Cell, ...]:
    chance = record["chance"]
    p = record["p"]
    kept = Cell(AT_CHANCE) if record["at_chance"] else _cell(record["retention"], "{:.0%}", " to ")
    return (
        Cell(f"{record['n']:,}"),
        Cell("" if chance is None else f"{chance:.2f}"),
        _cell(record["unedited"], "{:.2f}", "-"),
        _cell(record["edited"], "{:.2f}", "-"),
        kept,
        Cell("n/a" if p is None else "<.001" if p < 0.001 else f"{p:.3f}"),
    )


def _cell(estimate: Sequence[float | None], style: str, to: str) -> Cell:
    value, *bounds = estimate
    return Cell(style.format(value), to.join("?" if bound is None else style.format(bound) for bound in bounds))


def abilities_table(found: Mapping[str, Sequence[Record]]) -> Table:
    """At 80 columns: intervals stand below their figures."""
    shown = Table(box=box.SIMPLE_HEAD, title=TITLE, title_justify="left", padding=(0, 1, 0, 0))
    for name in HEADER:
        how: dict[str, Any] = {"max_width": 22} if name == HEADER[0] else {"justify": "right"}
        shown.add_column(name, overflow="fold", **how)
    for label, cells in ability_lines(found):
        shown.add_row(literal(label), *(Text.assemble(cell.text, (f"\n{cell.bounds}", "dim")) for cell in cells))
    return shown


def correlation_line(found: Mapping[str, Any]) -> str:
    """What the energy in low bands has to do with what is lost, in words; empty where it was not measured."""
    known = found.get("correlation")
    if not found.get("low_shares"):
        return ""
    what = "what a task loses and its share of activation energy in the lower half of the components"
    if known is None:
        return f"Spearman's correlation of {what}: not measured, fewer than four tasks are above chance or differ."
    value, low, high = known["value"]
    bounds = "no interval" if low is None or high is None else f"[{low:+.2f}, {high:+.2f}]"
    return f"Spearman's correlation of {what}: {value:+.2f} {bounds}, {len(known['tasks'])} tasks."


def abilities_section(found: Mapping[str, Any]) -> str:
    """For a page; empty where nothing was measured."""
    if not found:
        return ""
    text = (
        "The same questions before and after the edit. Kept: share of the score that is left, with an interval of the "
        "paired ratio (groups: over all questions of their tasks). p: McNemar's exact test, of how many answers "
        "changed in one direction. At chance: the unedited model does no better than who always gives the same answer, "
        "so there is nothing to lose."
    )
    body = [[label, *map(_html, cells)] for label, cells in ability_lines(found)]
    drawn = figure(abilities_figure(found), "what is left of each ability")
    said = correlation_line(found)
    return section("Abilities", paragraph(text), drawn, table(HEADER, body), paragraph(said) if said else "")


def _html(cell: Cell) -> str:
    bounds = f' <span class="interval">[{as_html(cell.bounds)}]</span>' if cell.bounds else ""
    return Html(as_html(cell.text) + bounds)
