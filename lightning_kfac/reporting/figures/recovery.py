"""What relearning brings back, over its steps."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_kfac.reporting.attacks import STRICT, recovery_curves
from lightning_kfac.reporting.escape import as_label
from lightning_kfac.reporting.figures.style import AFTER, BEFORE, colour, marker, new_figure
from lightning_kfac.reporting.labels import stage_label

Row = Mapping[str, Any]


def recovery_figure(rows: Sequence[Row], title: str) -> Figure:
    """Share of the sequences got word for word, and perplexity if it was measured, over the steps of each relearning.

    Args:
        rows: Results of the command ``attack``.
        title: What was attacked.
    """
    costs = any(row.get("perplexity") is not None for row in rows)
    figure = new_figure(8, 7 if costs else 5)
    share, *below = figure.subplots(1 + costs, 1, squeeze=False, sharex=True, height_ratios=(3, 2)[: 1 + costs])[:, 0]
    pair = {row["stage"]: row for row in rows if row.get("stage") in ("baseline", "edited")}
    for axes, key in ((share, STRICT), *((cost, "perplexity") for cost in below)):
        for stage, ink, style in (("baseline", BEFORE, "--"), ("edited", AFTER, ":")):
            if pair[stage].get(key) is not None:
                name = f"{stage_label(stage)} model"
                axes.axhline(pair[stage][key], color=ink, linewidth=1.4, linestyle=style, label=name)
    curves = recovery_curves(rows)
    for number, (label, points) in enumerate(curves.items()):
        shift = 1 + 0.06 * (number - (len(curves) - 1) / 2)  # intervals at the same step stand beside each other
        start = [pair["edited"]] if points[0]["attack"]["steps"] else []  # what 0 steps leave as it is
        _draw(share, number, label, shift, [_point(row, row.get("got") or _of(row, STRICT)) for row in start + points])
        for cost in below:
            _draw(cost, number, label, shift, [_point(row, _of(row, "perplexity")) for row in start + points])
    share.set_ylim(-0.03, 1.03)
    share.set_ylabel("got word for word")
    for cost in below:
        cost.set_yscale("log")
        cost.yaxis.set_major_formatter("{x:,.0f}")
        cost.yaxis.set_minor_formatter("{x:,.0f}")
        cost.set_ylabel("perplexity (log scale)")
    last = [share, *below][-1]
    last.set_xscale("symlog", linthresh=1)
    steps = sorted({0, *(row["attack"]["steps"] for points in curves.values() for row in points)})
    last.set_xticks(steps, list(map(str, steps)))
    last.set_xticks([], minor=True)
    last.set_xlim(-0.25, 1.4 * max(1, *steps))
    last.set_xlabel("steps of relearning, on text that is not measured")
    for axes in (share, *below):
        axes.grid(alpha=0.25)
    figure.legend(*share.get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=2)
    figure.suptitle(as_label(title), fontsize=11)
    return figure


class _Point(NamedTuple):
    """A figure after so many steps, with the ends of its interval."""

    step: int
    value: float
    low: float
    high: float


def _point(row: Row, figure: Sequence[float | None]) -> _Point | None:
    """None where the figure is not known; an end that is not known is the figure."""
    value, low, high = figure
    if value is None:
        return None
    step = row["attack"]["steps"] if "attack" in row else 0
    return _Point(step, value, value if low is None else low, value if high is None else high)


def _of(row: Row, name: str) -> list[float | None]:
    return [row.get(name), *((row.get("intervals") or {}).get(name) or (None, None))]


def _draw(axes: Axes, number: int, label: str, shift: float, points: Sequence[_Point | None]) -> None:
    """One line with its intervals."""
    known = [point for point in points if point is not None]
    axes.errorbar(
        [point.step * shift for point in known],
        [point.value for point in known],
        [[point.value - point.low for point in known], [point.high - point.value for point in known]],
        label=as_label(label),
        color=colour(2 + number),
        marker=marker(number),
        markersize=5,
        linewidth=1.2,
        elinewidth=0.8,
        capsize=2,
    )
