"""Where documents come out: heat strips along their tokens."""

from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure

from lightning_kfac.console import counted
from lightning_kfac.math.strips import Strip
from lightning_kfac.reporting.escape import as_label
from lightning_kfac.reporting.figures.style import new_figure

# Of log10 p: what is less likely than one in a million samples has the colour of the least.
LEAST = -6.0
NOT_MEASURED = "#8a8a8a"


def strips_figure(strips: Sequence[Strip]) -> Figure:
    """Each document as a strip for each stage, one under the other, all with one scale of colours.

    Cividis, which is made for the colour-blind, from p = 1e-6 and less (dark) to 1 (light); hatched where windows were
    left out of the measurement, white where no suffix lies.
    """
    lines = sum(len(strip.stages) for strip in strips)
    figure = new_figure(9.0, 1.3 + 0.3 * lines + 0.42 * len(strips))
    heights = [max(1, len(strip.stages)) for strip in strips]
    panels = figure.subplots(len(strips), 1, squeeze=False, height_ratios=heights)[:, 0]
    shades = matplotlib.colormaps["cividis"]
    scale = Normalize(LEAST, 0)
    for axes, strip in zip(panels, strips, strict=True):
        _draw(axes, strip, shades, scale)
    panels[-1].set_xlabel("tokens of the document", fontsize=8)
    bar = figure.colorbar(
        ScalarMappable(scale, shades), ax=list(panels), fraction=0.03, pad=0.01, shrink=min(1, 4 / lines)
    )
    bar.set_ticks([-6, -4, -2, 0], labels=["1e-6 or less", "1e-4", "0.01", "1"], fontsize=7)
    bar.set_label("p of one sample", fontsize=8)
    figure.suptitle("how likely one sample holds the passage that lies here (hatched: not measured)", fontsize=10)
    return figure


def _draw(axes: Axes, strip: Strip, shades: Colormap, scale: Normalize) -> None:
    stages = list(strip.stages)
    for number, stage in enumerate(stages):
        cells = strip.stages[stage]
        bottom = len(stages) - number - 0.92
        shown = np.ma.masked_invalid(np.clip(cells.log10_p, LEAST, 0))
        place = (0, strip.n_tokens, bottom, bottom + 0.84)
        axes.imshow(shown[None], cmap=shades, norm=scale, extent=place, aspect="auto", interpolation="nearest")
        width = strip.n_tokens / len(cells.asked)
        left_out = [(first * width, count * width) for first, count in _runs(cells.asked & np.isnan(cells.log10_p))]
        axes.broken_barh(left_out, (bottom, 0.84), facecolor="white", edgecolor=NOT_MEASURED, hatch="////", linewidth=0)
    axes.set_xlim(0, strip.n_tokens)
    axes.set_ylim(0, len(stages))
    named = [(len(stages) - n - 0.5, as_label(stage)) for n, stage in enumerate(stages) if stage]
    axes.set_yticks([place for place, _ in named], [name for _, name in named])
    axes.tick_params(labelsize=7, length=2)
    axes.set_title(f"{as_label(strip.name)} ({counted(strip.n_tokens, 'token')})", fontsize=8, loc="left", pad=2)


def _runs(flags: np.ndarray) -> list[tuple[int, int]]:
    """First place and length of each run of true values."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flags.astype(np.int8), [0]])))
    return [(int(first), int(last - first)) for first, last in zip(edges[::2], edges[1::2], strict=True)]
