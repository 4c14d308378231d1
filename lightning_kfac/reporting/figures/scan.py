"""Which blocks and projections carry the recitation."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from lightning_kfac.models.targets import PROJECTIONS
from lightning_kfac.reporting.escape import as_label
from lightning_kfac.reporting.figures.style import CUT, ON_LIGHT, new_figure

ALL = "all"
MEASURED = ("strict_acc", "perplexity")
Values = dict[tuple[int, str], float]


def scan_values(rows: Sequence[Mapping[str, Any]]) -> tuple[list[int], list[str], Values, Values] | None:
    """Blocks, projections, strict accuracies and rises of perplexity of a scan's edits of one block or projection.

    ``all`` is a whole block. Settings that were tried for the recommendation have another rho or several blocks.

    Args:
        rows: Results of a scan, the unedited model's among them.

    Returns:
        None where a figure is missing.
    """
    before = next((row for row in rows if row["edit"] is None), None)
    edits = [row for row in rows if row["edit"] and len(row["edit"]["blocks"]) == 1]
    if before is None or not edits or any(row.get(key) is None for row in (before, *edits) for key in MEASURED):
        return None
    alone = [row["edit"] for row in edits if len(row["edit"]["projections"]) == 1]
    rho = (alone[0] if alone else edits[0]["edit"])["rho"]
    names: dict[int, set[str]] = {}
    for row in edits:
        names.setdefault(row["edit"]["blocks"][0], set()).update(row["edit"]["projections"])
    strict: Values = {}
    cost: Values = {}
    for row in edits:
        if row["edit"]["rho"] == rho:
            block = row["edit"]["blocks"][0]
            projections = row["edit"]["projections"]
            place = block, projections[0] if len(projections) == 1 < len(names[block]) else ALL
            strict[place] = row["strict_acc"]
            cost[place] = row["perplexity"] / before["perplexity"] - 1
    order = [p for p in PROJECTIONS if any(p in known for known in names.values() if len(known) > 1)]
    return sorted(names), [ALL, *order], strict, cost


def scan_figure(
    blocks: Sequence[int],
    projections: Sequence[str],
    strict: Mapping[tuple[int, str], float],
    perplexity: Mapping[tuple[int, str], float],
    title: str,
    chosen: tuple[Sequence[int], Sequence[str]] | None = None,
) -> Figure:
    """Two heat maps over blocks and projections: strict accuracy left, and rise of perplexity, edited alone.

    Args:
        strict: By block and projection.
        perplexity: Relative to the unedited model: 0.1 is 10 % more.
        chosen: Blocks and projections that are recommended, which get a frame.
    """
    figure = new_figure(max(7.0, 1.6 + 0.62 * len(blocks)), 1.6 + 0.9 * len(projections))
    panels = figure.subplots(2, 1)
    for axes, values, name, style in (
        (panels[0], strict, "strict accuracy (lower: more of the recitation ran through here)", "{:.2f}"),
        (panels[1], {place: 100 * value for place, value in perplexity.items()}, "rise of perplexity, %", "{:.1f}"),
    ):
        grid = np.array([[values.get((block, projection), np.nan) for block in blocks] for projection in projections])
        mesh = axes.imshow(grid, cmap="cividis", aspect="auto")
        middle = (np.nanmin(grid) + np.nanmax(grid)) / 2
        for (row, column), value in np.ndenumerate(grid):
            if np.isfinite(value):
                ink = "white" if value < middle else ON_LIGHT
                axes.text(column, row, style.format(value), ha="center", va="center", fontsize=8, color=ink)
        axes.set_xticks(range(len(blocks)), blocks)
        axes.set_yticks(range(len(projections)), projections)
        axes.set_title(name, fontsize=9)
        if chosen is not None:
            _frame(axes, [blocks.index(b) for b in chosen[0]], _rows(projections, chosen[1]))
        figure.colorbar(mesh)
    panels[1].set_xlabel("block" if chosen is None else "block; framed: recommended")
    figure.suptitle(as_label(title), fontsize=11)
    return figure


def _rows(projections: Sequence[str], chosen: Sequence[str]) -> list[int]:
    """Of the chosen projections, and of whole blocks where these are all."""
    rows = [projections.index(p) for p in chosen if p in projections]
    whole = set(projections) - {ALL} <= set(chosen)
    return [0] if whole and projections[0] == ALL else rows


def _frame(axes: Axes, columns: Sequence[int], rows: Sequence[int]) -> None:
    """A line around the cells of these columns and rows, each by itself."""
    for column in columns:
        for row in rows:
            axes.add_patch(Rectangle((column - 0.46, row - 0.44), 0.92, 0.88, fill=False, edgecolor=CUT, linewidth=2.5))
