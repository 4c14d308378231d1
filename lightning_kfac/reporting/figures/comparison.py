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
from lightning_kfac.reporting.figures.style import AFTER, BEFORE, GREY, marker, new_figure, stage_colour
from lightning_kfac.reporting.labels import OF_IMAGES, stage_label

RATES = [name for name, label in LABELS.items() if label.panel == "rates"]
OTHERS = [name for name, label in LABELS.items() if label.panel == "own"]


def metrics_figure(records: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Every stage's figures with their 95 % intervals, and the paired change of each from the first stage.

    Args:
        records: Stage to record: figures, and ``intervals`` and ``differences`` by the name of the figure.
    """
    every = dict.fromkeys(key for record in records.values() for key in record)
    rates = [key for key in every if key.rpartition("/")[2] in RATES]
    others = [key for key in OTHERS if any(record.get(key) is not None for record in records.values())]
    heights = [0.9 + 0.3 * len(rates)] * bool(rates) + [1.1] * len(others)
    figure = new_figure(7, max(2.2, 0.5 + sum(heights)))
    panels = figure.subplots(
        max(1, len(heights)), 2, squeeze=False, height_ratios=heights or None, width_ratios=(3, 2)
    ).tolist()
    groups = [rates] * bool(rates) + [[key] for key in others]
    for number, ((left, right), keys) in enumerate(zip(panels, groups, strict=False)):
        _points(left, keys, records, [_name(key) for key in keys])
        _changes(right, keys, records)
        if number == 0:
            left.set_title("with 95 % intervals", fontsize=9)
            right.set_title("paired change", fontsize=9)
    if rates:
        panels[0][0].set_xlim(-0.04, 1.04)
    figure.legend(*panels[0][0].get_legend_handles_labels(), fontsize=8, loc="outside upper center", ncols=4)
    return figure


def loss_change_figure(edges: Sequence[float], counts: Sequence[int]) -> Figure:
    """Histogram of what an edit did to the loss of each token of the held-out text; the counts are logarithmic."""
    bounds = np.asarray(edges)
    tokens = np.asarray(counts)
    figure = new_figure(7, 3.6)
    axes = figure.add_subplot()
    middle = (bounds[:-1] + bounds[1:]) / 2
    colours = np.where(middle > 0, AFTER, BEFORE)
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
    figure = new_figure(max(5.0, 3.2 * len(curves)), 3.6)
    panels = figure.subplots(1, max(1, len(curves)), squeeze=False, sharey=True)[0]
    for axes, (name, stages) in zip(panels, curves.items(), strict=False):
        for number, (stage, shares) in enumerate(stages.items()):
            axes.plot(tries, shares, color=stage_colour(stage, number), label=as_label(stage_label(stage)))
            prefix = "" if name == MEMORIZED else f"{name}/"
            for n in TRIES:
                bounds = records.get(stage, {}).get("intervals", {}).get(f"{prefix}extraction.expected_at.{n}")
                if bounds and None not in bounds:
                    axes.plot([n, n], bounds, color=stage_colour(stage, number), marker="_", markersize=9)
        axes.set_xscale("log")
        axes.set_ylim(-0.03, 1.03)
        axes.set_title(as_label(name), fontsize=10)
        axes.set_xlabel("samples of each sequence")
        axes.grid(alpha=0.25)
    panels[0].set_ylabel("expected share extracted")
    panels[0].legend(fontsize=8)
    return figure


def _points(axes: Axes, keys: Sequence[str], records: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> None:
    """Each stage's figures, a line a figure; an arrow leads from the first stage to the last."""
    stages = list(records.values())
    for number, (stage, record) in enumerate(records.items()):
        place = np.arange(len(keys)) + _offset(number, len(stages))
        values = np.array([np.nan if record.get(key) is None else record[key] for key in keys], dtype=float)
        intervals = record.get("intervals") or {}
        bounds = [_bounds(intervals.get(key), value) for key, value in zip(keys, values.tolist(), strict=True)]
        axes.errorbar(
            values,
            place,
            xerr=np.abs(np.array(bounds).T - values),
            label=as_label(stage_label(stage)),
            color=stage_colour(stage, number),
            marker=marker(number),
            linestyle="",
            markersize=5,
            capsize=3,
        )
    _arrows(axes, keys, stages)
    axes.set_yticks(range(len(keys)), names, fontsize=8)
    axes.set_ylim(len(keys) - 0.5, -0.5)
    axes.grid(alpha=0.25)


def _arrows(axes: Axes, keys: Sequence[str], stages: Sequence[Mapping[str, Any]]) -> None:
    """From each figure of the first stage to that of the last."""
    style = {"arrowstyle": "->", "color": GREY, "linewidth": 1, "shrinkA": 4, "shrinkB": 4}
    for row, key in enumerate(keys if len(stages) > 1 else []):
        first = stages[0].get(key)
        last = stages[-1].get(key)
        if first is not None and last is not None and first != last:
            begin = first, row + _offset(0, len(stages))
            end = last, row + _offset(len(stages) - 1, len(stages))
            axes.annotate("", xy=end, xytext=begin, arrowprops=style)


def _changes(axes: Axes, keys: Sequence[str], records: Mapping[str, Mapping[str, Any]]) -> None:
    """The difference of each stage from the first with its paired interval."""
    drawn = False
    for number, (stage, record) in enumerate(records.items()):
        changes = record.get("differences") or {}
        known = [(row, changes[key]) for row, key in enumerate(keys) if changes.get(key) and None not in changes[key]]
        if known:
            rows, values = zip(*known, strict=True)
            middle, low, high = np.array(values, dtype=float).T
            place = np.array(rows) + (_offset(number, len(records)) if len(records) > 2 else 0)
            axes.errorbar(
                middle,
                place,
                xerr=[(middle - low).clip(min=0), (high - middle).clip(min=0)],
                color=stage_colour(stage, number),
                marker="D",
                linestyle="",
                markersize=4,
                capsize=3,
            )
            drawn = True
    axes.axvline(0, color=GREY, linewidth=0.8, linestyle="--")
    axes.set_yticks(range(len(keys)), [])
    axes.set_ylim(len(keys) - 0.5, -0.5)
    axes.grid(alpha=0.25)
    axes.set_visible(drawn)


def _offset(number: int, count: int) -> float:
    """Where a stage stands beside the others, in rows."""
    return min(0.2, 0.7 / count) * (number - (count - 1) / 2)


def _bounds(interval: Sequence[float | None] | None, value: float) -> tuple[float, float]:
    """The ends of an interval; the value itself where one is not known."""
    low, high = interval or (value, value)
    return value if low is None else low, value if high is None else high


def _name(key: str) -> str:
    prefix, _, name = key.rpartition("/")
    title = LABELS[name].short or LABELS[name].title if name in OTHERS else LABELS[name].title
    usual = "images" if name in OF_IMAGES else MEMORIZED
    of = as_label(prefix) or ("" if name in OTHERS else usual)
    return f"{of}: {title}" if of else title
