"""A study of crystallized attention as figures."""

import math

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from lightning_kfac.attention.comparison import BASELINE, TOP1, lowrank
from lightning_kfac.attention.study import Study
from lightning_kfac.reporting.figures.style import AFTER, BEFORE, COLOURS, ON_LIGHT, colour, marker


def curve_figure(study: Study) -> Figure:
    """Perplexity against the rank of the residual, between Top-1 and the unchanged model."""
    figure, axes = _figure("What a low-rank residual brings back")
    costs = study.comparison.costs
    base = costs[BASELINE].perplexity
    ranks = sorted(int(name.split()[1]) for name in costs if name.startswith("lowrank "))
    changes = [costs[lowrank(rank)].change for rank in ranks]
    values = [base * (1 + change.value) for change in changes]
    below = [base * (change.value - change.low) for change in changes]
    above = [base * (change.high - change.value) for change in changes]
    axes.errorbar(ranks, values, [below, above], color=BEFORE, marker="o", capsize=3, label="Top-1 + rank r")
    top1 = costs[TOP1].change
    axes.axhline(base * (1 + top1.value), color=AFTER, linestyle="--", label="Top-1")
    if top1.low == top1.low:  # NaN where there is no interval
        axes.axhspan(base * (1 + top1.low), base * (1 + top1.high), color=AFTER, alpha=0.15, linewidth=0)
    axes.axhline(base, color=COLOURS[7], linestyle=":", label="unchanged model")
    _rank_axis(axes, ranks)
    axes.set_xlabel(f"rank r of the residual, of {study.width}")
    axes.set_ylabel("perplexity on held-out text, 95 % intervals")
    axes.legend(fontsize=8)
    return figure


def spectra_figure(study: Study) -> Figure:
    """Cumulative variance of the residuals of every head."""
    figure, axes = _figure("How many directions the residuals take")
    ranks = range(1, study.width + 1)
    for number, (layer, spectra) in enumerate(study.spectra.items()):
        for head, shares in enumerate(spectra.cumulative_variance.tolist()):
            label = f"layer {layer}, one line a head" if head == 0 else None
            axes.plot(
                ranks,
                shares,
                color=_colour(number),
                marker=marker(number),
                linewidth=1,
                markersize=3,
                alpha=0.8,
                label=label,
            )
    axes.axhline(0.9, color=COLOURS[8], linestyle="--", linewidth=1, label="90 %")
    _rank_axis(axes, [2**power for power in range(study.width.bit_length())])
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("number of directions")
    axes.set_ylabel("share of the residuals' variance")
    axes.legend(fontsize=8, loc="lower right")
    return figure


def heads_figure(study: Study) -> Figure:
    """Two heat maps, layer by head: what Top-1 in a head alone costs, and the effective dimension."""
    layers = list(study.spectra)
    n_heads = max(head.head for head in study.heads) + 1
    height = 1.9 + 0.5 * len(layers)
    figure = Figure(figsize=(max(4.5, 2 + 0.6 * n_heads), 2 * height), layout="constrained")
    panels = (
        ("cost of Top-1 in this head alone, % of perplexity", "{:.2f}", lambda head: 100 * head.cost.value),
        (f"effective dimension of the residuals, of {study.width}", "{:.0f}", lambda head: head.effective_dimension),
    )
    for axes, (title, style, of) in zip(figure.subplots(2, 1), panels, strict=True):
        grid = [[math.nan] * n_heads for _ in layers]
        for head in study.heads:
            grid[layers.index(head.layer)][head.head] = of(head)
        image = axes.imshow(grid, cmap="cividis", aspect="auto")
        _write_cells(axes, image, grid, style)
        axes.set_title(title, fontsize=10)
        axes.set_xticks(range(n_heads))
        axes.set_yticks(range(len(layers)), layers)
        axes.set_xlabel("head")
        axes.set_ylabel("layer")
        figure.colorbar(image, ax=axes)
    return figure


def sharpness_figure(study: Study) -> Figure:
    """Cost of Top-1 in each head alone against how sharp its attention is."""
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    panels = {"mean largest probability": "top1_mass", "mean entropy of attention, nats": "entropy"}
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, (label, name) in zip((left, right), panels.items(), strict=True):
        for number, layer in enumerate(study.spectra):
            heads = [head for head in study.heads if head.layer == layer]
            costs = [100 * head.cost.value for head in heads]
            below = [100 * (head.cost.value - head.cost.low) for head in heads]
            above = [100 * (head.cost.high - head.cost.value) for head in heads]
            x = [getattr(head, name) for head in heads]
            axes.errorbar(
                x,
                costs,
                [below, above],
                fmt=marker(number),
                color=_colour(number),
                label=f"layer {layer}",
                capsize=2,
            )
        axes.axhline(0, color=COLOURS[8], linewidth=0.8)
        axes.set_xlabel(label)
        axes.grid(alpha=0.25)
    left.set_ylabel("cost of Top-1 in this head alone, % of perplexity")
    left.legend(fontsize=8)
    figure.suptitle("Do sharp heads tolerate it?", fontsize=11)
    return figure


def _colour(number: int) -> str:
    """Of a layer."""
    return colour(number)


def _figure(title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=11)
    axes.grid(alpha=0.25)
    return figure, axes


def _rank_axis(axes: Axes, ranks: list[int]) -> None:
    axes.set_xscale("symlog" if 0 in ranks else "log", base=2)
    axes.set_xticks(ranks, [str(rank) for rank in ranks])
    axes.minorticks_off()


def _write_cells(axes: Axes, image: AxesImage, grid: list[list[float]], style: str) -> None:
    middle = sum(image.get_clim()) / 2
    for row, cells in enumerate(grid):
        for column, value in enumerate(cells):
            if not math.isnan(value):
                colour = ON_LIGHT if value > middle else "white"
                axes.text(column, row, style.format(value), ha="center", va="center", fontsize=8, color=colour)
