"""What a layer's curvature looks like: spectra, mass, and the set of components that an edit keeps."""

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure

from lightning_kfac.factors.spectra import Cut, LayerSpectrum
from lightning_kfac.reporting.escape import as_label
from lightning_kfac.reporting.figures.style import CUT, depth_colours, name_blocks, new_figure

POINTS = 200


def spectra_figure(projection: str, layers: Mapping[int | None, LayerSpectrum]) -> Figure:
    """Eigenvalues of A and G of one projection in every block, largest first, both axes logarithmic."""
    figure = new_figure()
    left, right = figure.subplots(1, 2)
    for axes, side, name in ((left, "mu", "A (inputs)"), (right, "lambdas", "G (gradients)")):
        for colour, (block, layer) in zip(depth_colours(list(layers)), layers.items(), strict=True):
            values = getattr(layer, side)
            values = values[values > 0]
            ranks = _log_ranks(len(values))
            axes.loglog(ranks + 1, values[ranks], color=colour, label=_block(block), linewidth=1.2)
        axes.set_xlabel("rank of the eigenvalue")
        axes.set_ylabel("eigenvalue")
        axes.set_title(f"{as_label(projection)}: eigenvalues of {name}", fontsize=10)
        axes.grid(alpha=0.25)
    name_blocks(right, len(layers))
    return figure


def mass_figure(projection: str, layers: Mapping[int | None, LayerSpectrum]) -> Figure:
    """Share of the curvature mass in the most important components, and where rho cuts."""
    figure = new_figure(7, 4.2)
    axes = figure.add_subplot()
    for colour, (block, layer) in zip(depth_colours(list(layers)), layers.items(), strict=True):
        kept, mass = layer.curve
        axes.semilogx(100 * kept, 100 * mass, color=colour, label=_block(block), linewidth=1.2)
        if layer.cut is not None:
            axes.plot(100 * layer.cut.fraction_kept, 100 * layer.cut.rho, "o", color=colour, markersize=4)
    rhos = sorted({layer.cut.rho for layer in layers.values() if layer.cut is not None})
    for rho in rhos:
        axes.axhline(100 * rho, color=CUT, linestyle="--", linewidth=0.9, label=f"rho {rho:g}")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("components kept, most important first (% of all, log scale)")
    axes.set_ylabel("share of the curvature mass (%)")
    axes.set_title(f"{as_label(projection)}: how few components hold the curvature", fontsize=10)
    axes.grid(alpha=0.25)
    name_blocks(axes, len(layers) + len(rhos))
    return figure


def kept_figure(name: str, layer: LayerSpectrum, cut: Cut) -> Figure:
    """Heat map of log10 importance over both ranks (log scales), with the staircase that rho keeps."""
    figure = new_figure(5.6, 4.4)
    axes = figure.add_subplot()
    rows = _log_ranks(len(layer.lambdas), 80)
    columns = _log_ranks(len(layer.mu), 80)
    importance = np.outer(layer.lambdas[rows], layer.mu[columns])
    floor = importance.max() * 1e-12
    shades = np.log10(np.maximum(importance, floor))
    mesh = axes.pcolormesh(columns + 1, rows + 1, shades, cmap="cividis", shading="nearest", rasterized=True)
    figure.colorbar(mesh, label="log10 importance (eigenvalue of G x eigenvalue of A)")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.invert_yaxis()
    # The end of each row's kept columns; rows that keep none lie below the staircase.
    some = cut.kept[rows] > 0
    x = cut.kept[rows][some] + 0.5
    y = rows[some] + 1
    label = f"kept at rho {cut.rho:g}: {cut.fraction_kept:.1%}"
    axes.step(x, y, where="mid", color="white", linewidth=2.4)
    axes.step(x, y, where="mid", color=CUT, linewidth=1.4, label=label)
    axes.set_xlabel("rank in the spectrum of A")
    axes.set_ylabel("rank in the spectrum of G")
    axes.set_title(f"{as_label(name)}: importance, and what an edit keeps (left above the line)", fontsize=9)
    axes.legend(fontsize=8, loc="upper left")
    return figure


def _block(block: int | None) -> str:
    return "" if block is None else f"block {block}"


def _log_ranks(count: int, points: int = POINTS) -> np.ndarray:
    """Ranks from 0 to count - 1, evenly spread on a logarithmic scale, each once."""
    if count == 0:
        return np.empty(0, dtype=int)
    return np.unique(np.geomspace(1, count, min(points, count)).round().astype(int)) - 1
