"""What survives of an edit under attack, as a person reads it: rows of ``results.jsonl`` in, cells out."""

import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rich import box
from rich.table import Table
from rich.text import Text

from lightning_kfac.console import literal

Row = Mapping[str, Any]
STRICT = "strict_acc"
NOTHING = "nothing was suppressed"
TITLE = "What survives: share of the sequences got word for word"
# Of 80 columns the figures take the rest.
LABEL = 20
HEADER = ("attack", "unedited", "edited", "attacked", "recovered", "perplexity")
# What else may come back, where there is room for it; samples and prompts have none of it.
NEARLY = {"loose_acc": "of loose accuracy", "avg_levenshtein_norm": "of the distance"}


class Cell(NamedTuple):
    """A figure as text, with its interval where it has one."""

    text: str
    bounds: str = ""


class Line(NamedTuple):
    """What one attack does.

    Attributes:
        label: Its name.
        cells: Those of ``HEADER`` but for the first.
        nearly: What it recovers of each figure of ``NEARLY``.
    """

    label: str
    cells: tuple[Cell, ...]
    nearly: tuple[Cell, ...]


def attack_rows(rows: Sequence[Row]) -> list[Row]:
    """The latest row of each attack, in the order in which they were first measured."""
    return list({row["point"]: row for row in rows if row.get("stage") == "attacked"}.values())


def attack_label(row: Row) -> str:
    """What was done, with the number of steps of a relearning."""
    steps = row["attack"].get("steps")
    return row["label"] + ("" if steps is None else f", {steps} step{'' if steps == 1 else 's'}")


def attack_lines(rows: Sequence[Row]) -> list[Line]:
    """One line an attack: the share that is got word for word of unedited, edited and attacked model, what the attack
    recovers of the difference, and what it does to general text.

    Args:
        rows: Results of the command ``attack``: stages ``baseline``, ``edited`` and ``attacked``.
    """
    pair = {row["stage"]: row for row in rows if row.get("stage") in ("baseline", "edited")}
    before = tuple(_share(pair[stage].get(STRICT), _bounds(pair[stage])) for stage in ("baseline", "edited"))
    return [
        Line(
            attack_label(row),
            (*before, _share(row["got"][0], row["got"][1:]), recovered_cell(row), _perplexity(row)),
            tuple(_recovered(row["recovered"][name]) if name in row["recovered"] else Cell("") for name in NEARLY),
        )
        for row in attack_rows(rows)
    ]


def recovered_cell(row: Row) -> Cell:
    """What an attack recovers of the recitation that was suppressed, with its interval."""
    return _recovered(row["recovered"][STRICT])


def recovery_curves(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of each relearning by the number of its steps."""
    curves: dict[tuple[str, str], list[Row]] = {}
    for row in attack_rows(rows):
        if row["attack"].get("steps") is not None:
            settings = {key: value for key, value in row["attack"].items() if key not in ("steps", "learned")}
            curves.setdefault((row["label"], json.dumps(settings, sort_keys=True)), []).append(row)
    named: dict[str, list[Row]] = {}
    for (label, _), points in curves.items():
        alike = (f"{label} ({number})" for number in itertools.count(2))  # the same but for another setting
        name = next(name for name in itertools.chain([label], alike) if name not in named)
        named[name] = sorted(points, key=lambda row: row["attack"]["steps"])
    return named


def attacks_table(rows: Sequence[Row]) -> Table:
    """What survives, at 80 columns: intervals stand below their figures."""
    table = Table(box=box.SIMPLE_HEAD, title=TITLE, title_justify="left", padding=(0, 1, 0, 0))
    for name in HEADER:
        how: dict[str, Any] = {"min_width": LABEL} if name == HEADER[0] else {"justify": "right", "no_wrap": True}
        table.add_column(name, overflow="fold", **how)
    for line in attack_lines(rows):
        table.add_row(
            literal(line.label), *(Text.assemble(cell.text, (f"\n{cell.bounds}", "dim")) for cell in line.cells)
        )
    return table


def _share(value: float | None, bounds: Sequence[float | None]) -> Cell:
    return Cell("n/a" if value is None else f"{value:.2f}", _between(bounds, "{:.2f}", "-"))


def _bounds(row: Row) -> Sequence[float | None]:
    return (row.get("intervals") or {}).get(STRICT) or (None, None)


def _recovered(share: Sequence[float | None] | None) -> Cell:
    if share is None or share[0] is None:
        return Cell(NOTHING)
    # Where no resample differs, the interval of the attacked figure says more.
    bounds = (None, None) if share[0] == share[1] == share[2] else share[1:]
    return Cell(f"{share[0]:.0%}", _between(bounds, "{:.0%}", " to "))


def _perplexity(row: Row) -> Cell:
    value = row.get("perplexity")
    bounds = (row.get("intervals") or {}).get("perplexity") or (None, None)
    if value is None:
        return Cell("n/a")
    style = "{:.1f}" if value < 1000 else "{:.0f}" if value < 1e5 else "{:.0e}"
    return Cell(style.format(value), _between(bounds, style, "-"))


def _between(bounds: Sequence[float | None], style: str, to: str) -> str:
    low, high = bounds
    if low is None and high is None:
        return ""
    return to.join("?" if bound is None else style.format(bound) for bound in (low, high))
