"""Which blocks and projections carry the recitation."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from lightning_kfac.reporting.escape import as_label
from lightning_kfac.reporting.figures.style import new_figure


def scan_figure(
    blocks: Sequence[int],
    projections: Sequence[str],
    strict: Mapping[tuple[int, str], float],
    perplexity: Mapping[tuple[int, str], float],
    title: str,
) -> Figure:
    """Two heat maps over blocks and projections: strict accuracy left, and rise of perplexity, edited alone.

    Args:
        strict: By block and projection.
        perplexity: Relative to the unedited model: 0.1 is 10 % more.
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
                ink = "white" if value < middle else "black"
                axes.text(column, row, style.format(value), ha="center", va="center", fontsize=8, color=ink)
        axes.set_xticks(range(len(blocks)), blocks)
        axes.set_yticks(range(len(projections)), projections)
        axes.set_title(name, fontsize=9)
        figure.colorbar(mesh)
    panels[1].set_xlabel("block")
    figure.suptitle(as_label(title), fontsize=11)
    return figure
