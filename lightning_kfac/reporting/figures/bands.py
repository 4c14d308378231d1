"""How strongly each text excites each band of curvature."""

from collections.abc import Mapping

import numpy as np
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from lightning_kfac.math.bands import Bands, Exponent
from lightning_kfac.reporting.escape import as_label
from lightning_kfac.reporting.figures.style import ON_LIGHT, colour, marker, new_figure


def bands_figure(name: str, shares: Mapping[str, Bands], ratios: Mapping[str, Bands], against: str) -> Figure:
    """Of one layer: shares of every text, and ratios against one of them, with 95 % intervals."""
    figure = new_figure(9, 4)
    left, right = figure.subplots(1, 2)
    for axes, values in ((left, shares), (right, ratios)):
        for number, (text, bands) in enumerate(values.items()):
            place = np.arange(1, len(bands.value) + 1) + 0.08 * (number - (len(values) - 1) / 2)
            errors = np.stack([bands.value - bands.low, bands.high - bands.value]).clip(min=0)
            index = list(shares).index(text)
            axes.errorbar(
                place,
                bands.value,
                errors,
                label=as_label(text),
                color=colour(index),
                marker=marker(index),
                markersize=4,
                linewidth=1,
                capsize=2,
            )
        axes.set_xlabel("band of curvature (1: highest)")
        axes.set_xticks(range(1, len(bands.value) + 1))
        axes.grid(alpha=0.25)
        axes.legend(fontsize=8)
    left.set_ylabel("share of the output, ||W_b x|| / ||W x|| (RMS)")
    left.set_title(f"{as_label(name)}: which curvature each text uses", fontsize=10)
    right.axhline(1, color="grey", linewidth=0.8, linestyle="--")
    right.set_ylabel(f"||W_b x|| over that of {as_label(against)} (RMS)")
    right.set_title(f"{as_label(name)}: against {as_label(against)}", fontsize=10)
    return figure


def ratios_figure(text: str, against: str, layers: Mapping[str, Bands]) -> Figure:
    """Of all layers: the ratio of one text to another as a heat map of layers and bands."""
    values = np.stack([bands.value for bands in layers.values()])
    figure = new_figure(8, max(2.4, 1.2 + 0.32 * len(layers)))
    axes = figure.add_subplot()
    spread = max(0.05, float(np.abs(values - 1).max()))
    colours = TwoSlopeNorm(1, 1 - spread, 1 + spread)
    mesh = axes.imshow(values, cmap="PuOr_r", norm=colours, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        ink = "white" if abs(value - 1) > 0.65 * spread else ON_LIGHT
        axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color=ink)
    axes.set_xticks(range(values.shape[1]), [str(band) for band in range(1, values.shape[1] + 1)])
    axes.set_yticks(range(len(layers)), [as_label(name) for name in layers], fontsize=8)
    axes.set_xlabel("band of curvature (1: highest)")
    axes.set_title(f"RMS output on {as_label(text)} over that on {as_label(against)}, by band", fontsize=10)
    figure.colorbar(mesh)
    return figure


def whitening_figure(text: str, against: str, layers: Mapping[str, Mapping[str, Exponent]]) -> Figure:
    """Whitening exponents of all layers with their intervals, of inputs and outputs."""
    figure = new_figure(max(6.0, 2.4 + 0.5 * len(layers)), 3.8)
    axes = figure.add_subplot()
    for number, side in enumerate(("inputs", "outputs")):
        place = np.arange(len(layers)) + 0.12 * (2 * number - 1)
        values = np.array([sides[side] for sides in layers.values()])
        errors = np.stack([values[:, 0] - values[:, 1], values[:, 2] - values[:, 0]]).clip(min=0)
        axes.errorbar(
            place,
            values[:, 0],
            errors,
            label=side,
            color=colour(number),
            marker=marker(number),
            linestyle="none",
            capsize=2,
        )
    axes.axhline(0, color="grey", linewidth=0.8, linestyle="--")
    axes.set_xticks(range(len(layers)), [as_label(name) for name in layers], rotation=60, fontsize=8)
    axes.set_ylabel("slope of log(E / E ordinary) on log(E ordinary)", fontsize=9)
    axes.set_title(f"Whitening exponent of {as_label(text)} against {as_label(against)}", fontsize=10)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8)
    return figure
