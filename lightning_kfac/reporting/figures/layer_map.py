"""Which layers are coupled to what a model recites."""

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure

from lightning_kfac.models.targets import PROJECTIONS
from lightning_kfac.reporting.escape import as_label
from lightning_kfac.reporting.figures.style import ON_LIGHT, new_figure


def layer_map_figure(values: Mapping[tuple[int, str], float], title: str) -> Figure:
    """A heat map of blocks and projections.

    Args:
        values: Coupling to the memorized text over that to ordinary text, by block and projection.
        title: Of which model.
    """
    blocks = sorted({block for block, _ in values})
    projections = [p for p in PROJECTIONS if any(place[1] == p for place in values)]
    figure = new_figure(max(6.0, 1.8 + 0.6 * len(blocks)), 1.6 + 0.5 * len(projections))
    axes = figure.add_subplot()
    grid = np.array([[values.get((block, projection), np.nan) for block in blocks] for projection in projections])
    mesh = axes.imshow(grid, cmap="cividis", aspect="auto")
    middle = (np.nanmin(grid) + np.nanmax(grid)) / 2
    for (row, column), value in np.ndenumerate(grid):
        if np.isfinite(value):
            ink = "white" if value < middle else ON_LIGHT
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=8, color=ink)
    axes.set_xticks(range(len(blocks)), [str(block) for block in blocks])
    axes.set_yticks(range(len(projections)), projections)
    axes.set_xlabel("block")
    axes.set_title(f"{as_label(title)}: coupling to memorized over ordinary text", fontsize=10)
    figure.colorbar(mesh)
    return figure
