"""Methods at matched forgetting, as a person reads them: rows of ``results.jsonl`` in, cells out."""

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from rich import box
from rich.table import Table
from rich.text import Text

from lightning_kfac.console import format_seconds, literal, visible
from lightning_kfac.reporting.attacks import STRICT, Cell, attack_label, attack_rows, recovered_cell

Row = Mapping[str, Any]
# The half that methods may see and that chooses the strength, as a set of the evaluation.
CHOOSING = "choosing"
CHOSEN_BY = f"{CHOOSING}/strict_acc"
LABEL = 14, 20  # least and most
TITLE = 14  # of a column
UNEDITED = "unedited"
# Of 80 columns the figures take the rest.
FIGURES = {
    CHOSEN_BY: ("its half", "{:.2f}"),
    "strict_acc": ("other half", "{:.2f}"),
    "perplexity": ("perplexity", "{:.1f}"),
    "ndcg@10": ("nDCG", "{:.3f}"),
    "extraction.expected_at.1000": ("in 1,000", "{:.2f}"),
}
# Without intervals: what was chosen is no estimate, that of nDCG is narrower than the others.
BARE = (CHOSEN_BY, "ndcg@10")
AFTER = "strict_acc"  # the other sources stand behind it


class Chosen(NamedTuple):
    """One method at the strength that is compared.

    Attributes:
        label: Which method.
        row: Its result; of one that never gets there the one that suppresses most.
        reached: Whether it gets there.
    """

    label: str
    row: Row
    reached: bool


def method_rows(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Results by method, in the order in which they were first measured."""
    kinds: dict[str, list[Row]] = {}
    for row in {row["point"]: row for row in rows if "method" in row}.values():
        kinds.setdefault(row["method"]["label"], []).append(row)
    return kinds


def weakest(rows: Sequence[Row], key: str, target: float) -> Row | None:
    """Of the results of one method the weakest with a figure at ``target`` or below; None where none is.

    Args:
        rows: With ``method``: ``amount`` is the strength, ``falling`` says that a smaller one suppresses more.
        key: The figure.
    """
    reached = [row for row in rows if row.get(key) is not None and row[key] <= target]
    return min(reached, key=lambda row: order_of(row["method"]), default=None)


def order_of(about: Mapping[str, Any]) -> float:
    """Where a strength stands, from weak to strong."""
    return -about["amount"] if about["falling"] else about["amount"]


def chosen(rows: Sequence[Row], target: float) -> list[Chosen]:
    """Of each method the weakest strength that brings the choosing half to the target, by perplexity; then the rest.

    Args:
        rows: Results of the command ``compare``.
        target: Strict accuracy.
    """
    found = []
    for label, of_kind in method_rows(rows).items():
        row = weakest(of_kind, CHOSEN_BY, target)
        least = min(of_kind, key=lambda row: _known(row, CHOSEN_BY))
        found.append(Chosen(label, row or least, row is not None))
    return sorted(found, key=lambda one: (not one.reached, _known(one.row, "perplexity")))


def strength(row: Row) -> str:
    """The setting that was chosen: ``rho 0.84``."""
    return f"{row['method']['strength']} {row['method']['amount']:g}"


def header(rows: Sequence[Row]) -> list[str]:
    """Of ``comparison_lines``, but for the first column."""
    return [title for _, title, _ in _columns(rows)] + ["change"]


def comparison_lines(rows: Sequence[Row], target: float) -> list[tuple[str, list[Cell]]]:
    """Figures of the unedited model and of each method at its strength.

    Args:
        rows: Results of the command ``compare``, the unedited model's among them.
        target: Strict accuracy on the choosing half.
    """
    columns = _columns(rows)
    lines = [(UNEDITED, [*(_cell(row, key, style) for key, _, style in columns), Cell("")]) for row in _baseline(rows)]
    for one in chosen(rows, target):
        label = f"{one.label}, {strength(one.row)}" + ("" if one.reached else " (not reached)")
        cells = [_cell(one.row, key, style) for key, _, style in columns]
        lines.append((label, [*cells, Cell(f"{one.row['edit']['relative_change']:.2f}")]))
    return lines


def needs_lines(
    rows: Sequence[Row], target: float, attacked: Mapping[str, Sequence[Row]]
) -> tuple[list[str], list[tuple[str, list[Cell]]]]:
    """What each method needs and takes, and what each attack recovers of what it suppressed.

    Args:
        attacked: Results of attacks, by method.

    Returns:
        Titles of the columns behind the first, and the lines.
    """
    labels = list(dict.fromkeys(attack_label(row) for some in attacked.values() for row in attack_rows(some)))
    lines = []
    for one in chosen(rows, target):
        seconds = one.row["method"]["seconds"]
        cells = [Cell(one.row["method"]["needs"]), Cell("n/a" if seconds is None else format_seconds(seconds))]
        found = {attack_label(row): row for row in attack_rows(attacked.get(one.label, []))}
        cells += [recovered_cell(found[name]) if name in found else Cell("") for name in labels]
        lines.append((one.label, cells))
    return ["needs", "time", *labels], lines


def most_recovered(attacked: Sequence[Row]) -> str | None:
    """The attack that recovers most of what was suppressed, and how much; None without one."""
    shares = {attack_label(row): row["recovered"][STRICT] for row in attack_rows(attacked)}
    known = {label: share[0] for label, share in shares.items() if share and share[0] is not None}
    if not known:
        return None
    worst = max(known, key=lambda label: known[label])
    return f"{worst} ({100 * known[worst]:.0f} %)"


def comparison_table(rows: Sequence[Row], target: float) -> Table:
    """Methods at matched forgetting, at 80 columns: intervals stand below their figures."""
    title = f"At the weakest strength with strict accuracy {target:g} or less on the half that chose"
    return _table(title, "method", header(rows), comparison_lines(rows, target))


def needs_table(rows: Sequence[Row], target: float, attacked: Mapping[str, Sequence[Row]]) -> Table:
    """What each method needs, and what comes back, at 80 columns."""
    titles, lines = needs_lines(rows, target, attacked)
    title = "What each needs and takes" + (", and what attacks recover on the other half" if len(titles) > 2 else "")
    return _table(title, "method", titles, lines)


def _table(title: str, first: str, titles: Iterable[str], lines: Iterable[tuple[str, list[Cell]]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", padding=(0, 1, 0, 0))
    table.add_column(first, min_width=LABEL[0], max_width=LABEL[1], overflow="fold")
    for name in titles:  # titles of attacks are long, and folded between words
        title = "\n".join(textwrap.wrap(visible(name), TITLE))
        table.add_column(Text(title), justify="left" if name == "needs" else "right", no_wrap=True)
    for label, cells in lines:
        texts = [Text.assemble(cell.text, (f"\n{cell.bounds}" if cell.bounds else "", "dim")) for cell in cells]
        table.add_row(literal(label), *texts)
    return table


def _columns(rows: Sequence[Row]) -> list[tuple[str, str, str]]:
    """Keys, titles and styles of the figures that are there; further sets stand behind the other half."""
    row = next(iter(_baseline(rows)), {})
    others = [key for key in row if key.endswith("/strict_acc") and key != CHOSEN_BY]
    columns = []
    for key, (title, style) in FIGURES.items():
        if row.get(key) is not None:
            columns.append((key, title, style))
        if key == AFTER:
            columns += [(other, other.partition("/")[0], style) for other in others]
    return columns


def _baseline(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row.get("stage") == "baseline"][-1:]


def _cell(row: Row, key: str, style: str) -> Cell:
    value = row.get(key)
    if value is None:
        return Cell("n/a")
    bounds = (row.get("intervals") or {}).get(key) or (None, None)
    if key in BARE or None in bounds or bounds[0] == bounds[1]:
        return Cell(style.format(value))
    return Cell(style.format(value), "-".join(style.format(bound) for bound in bounds))


def _known(row: Row, key: str) -> float:
    value = row.get(key)
    return float("inf") if value is None else float(value)
