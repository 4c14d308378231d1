"""Before and after an edit."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_kfac.data.names import MEMORIZED
from lightning_kfac.metrics.extraction import TRIES
from lightning_kfac.metrics.registry import LABELS
from lightning_kfac.reporting.escape import as_label
from lightning_kfac.reporting.figures.style import COLOURS, colour, marker, new_figure
from lightning_kfac.reporting.labels import OF_IMAGES

RATES = [name for name, label in LABELS.items() if label.panel == "rates"]
OTHERS = [name for name, label in LABELS.items() if label.panel == "own"]


def metrics_figure(records: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Every stage's figures side by side with their 95 % intervals.

    Args:
        records: Stage to record: figures, and ``intervals`` by the name of the figure.
    """
    every = dict.fromkeys(key for record in records.values() for key in record)
    rates = [key for key in every if key.rpartition("/")[2] in RATES]
    others = [key for key in OTHERS if any(record.get(key) is not None for record in records.values())]
    figure = new_figure(9, max(3.0, 0.9 + 0.34 * len(rates)))
    widths = [3] * bool(rates) + [1.4] * len(others)
    panels = list(figure.subplots(1, max(1, len(widths)), width_ratios=widths or None, squeeze=False)[0])
    if rates:
        _points(panels[0], rates, records, [_rate_name(key) for key in rates])
        panels[0].set_xlim(-0.04, 1.04)
        panels[0].set_title("rates and distances, with 95 % intervals", fontsize=10)
    figure.legend(*panels[0].get_legend_handles_labels(), fontsize=8, loc="outside upper center", ncols=4)
    for axes, key in zip(panels[bool(rates) :], others, strict=True):
        _points(axes, [key], records, [""])
        axes.set_title(LABELS[key].short or LABELS[key].title, fontsize=9)
    return figure


def loss_change_figure(edges: Sequence[float], counts: Sequence[int]) -> Figure:
    """Histogram of what an edit did to the loss of each token of the held-out text; the counts are logarithmic."""
    bounds = np.asarray(edges)
    tokens = np.asarray(counts)
    figure = new_figure(7.5, 3.8)
    axes = figure.add_subplot()
    middle = (bounds[:-1] + bounds[1:]) / 2
    colours = np.where(middle > 0, COLOURS[4], COLOURS[0])
    axes.bar(bounds[:-1], tokens, width=np.diff(bounds), align="edge", color=colours)
    axes.set_yscale("log")
    total = max(1, tokens.sum())
    worse = tokens[middle > 0.1].sum() / total
    better = tokens[middle < -0.1].sum() / total
    axes.set_xlabel("loss after - loss before, in nats (the outermost bins hold what lies beyond)")
    axes.set_ylabel("tokens (log scale)")
    axes.set_title(
        f"Held-out tokens: the loss of {worse:.0%} rises, of {better:.0%} falls by more than 0.1 nats", fontsize=10
    )
    axes.grid(alpha=0.25)
    return figure


def extraction_figure(
    tries: Sequence[int], curves: Mapping[str, Mapping[str, Sequence[float]]], records: Mapping[str, Mapping[str, Any]]
) -> Figure:
    """What somebody gets who samples so often: the expected share of each set, a line a stage.

    Args:
        tries: Numbers of samples of each sequence.
        curves: Set to stage to expected shares.
        records: Stage to record, whose 95 % intervals are drawn where there are any.
    """
    figure = new_figure(max(5.0, 4.4 * len(curves)), 3.8)
    panels = figure.subplots(1, max(1, len(curves)), squeeze=False, sharey=True)[0]
    for axes, (name, stages) in zip(panels, curves.items(), strict=False):
        for number, (stage, shares) in enumerate(stages.items()):
            axes.plot(tries, shares, color=colour(number), label=as_label(stage))
            prefix = "" if name == MEMORIZED else f"{name}/"
            for n in TRIES:
                bounds = records.get(stage, {}).get("intervals", {}).get(f"{prefix}extraction.expected_at.{n}")
                if bounds and None not in bounds:
                    axes.plot([n, n], bounds, color=colour(number), marker="_", markersize=9)
        axes.set_xscale("log")
        axes.set_ylim(-0.03, 1.03)
        axes.set_title(as_label(name), fontsize=10)
        axes.set_xlabel("samples of each sequence")
        axes.grid(alpha=0.25)
    panels[0].set_ylabel("expected share extracted")
    panels[0].legend(fontsize=8)
    return figure


def _points(axes: Axes, keys: Sequence[str], records: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> None:
    for number, (stage, record) in enumerate(records.items()):
        place = np.arange(len(keys)) + min(0.16, 0.7 / len(records)) * (number - (len(records) - 1) / 2)
        values = np.array([np.nan if record.get(key) is None else record[key] for key in keys], dtype=float)
        intervals = record.get("intervals", {})
        bounds = [_bounds(intervals.get(key), value) for key, value in zip(keys, values.tolist(), strict=True)]
        axes.errorbar(
            values,
            place,
            xerr=np.abs(np.array(bounds).T - values),
            label=as_label(stage),
            color=colour(number),
            marker=marker(number),
            linestyle="",
            markersize=5,
            capsize=3,
        )
    axes.set_yticks(range(len(keys)), names, fontsize=8)
    axes.set_ylim(len(keys) - 0.5, -0.5)
    axes.grid(alpha=0.25)


def _bounds(interval: Sequence[float | None] | None, value: float) -> tuple[float, float]:
    """The ends of an interval; the value itself where one is not known."""
    low, high = interval or (value, value)
    return value if low is None else low, value if high is None else high


def _rate_name(key: str) -> str:
    prefix, _, name = key.rpartition("/")
    return f"{as_label(prefix) or ('images' if name in OF_IMAGES else 'memorized')}: {LABELS[name].title}"
