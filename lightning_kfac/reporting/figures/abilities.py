"""What an edit leaves of each ability, as bars."""

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from lightning_kfac.reporting.escape import as_label
from lightning_kfac.reporting.figures.style import colour, new_figure

MOST_SHOWN = 1.5


def abilities_figure(found: Mapping[str, Any], title: str = "what is left of each ability") -> Figure:
    """A bar a task with its interval, by group; hollow where the unedited model does no better than chance.

    Args:
        found: ``tasks`` and ``groups`` of ``abilities.json``.
    """
    groups = [group["name"] for group in found["groups"]]
    tasks = [task for group in groups for task in found["tasks"] if task["group"] == group]
    figure = new_figure(8, 1.4 + 0.34 * len(tasks))
    axes = figure.add_subplot()
    for place, task in enumerate(tasks):
        shade = colour(groups.index(task["group"]))
        value, low, high = task["retention"] or (0.0, None, None)
        hollow = task["at_chance"]
        axes.barh(
            place,
            min(value, MOST_SHOWN),
            color="none" if hollow else shade,
            edgecolor=shade,
            height=0.66,
        )
        if not hollow and low is not None and high is not None:
            ends = (min(low, MOST_SHOWN), min(high, MOST_SHOWN))
            axes.plot(ends, (place, place), color="black", linewidth=1, marker="|", markersize=5)
        if hollow:
            axes.text(0.02, place, "at chance", va="center", fontsize=7.5)
    axes.axvline(1, color="grey", linewidth=0.8, linestyle="--")
    axes.set_yticks(range(len(tasks)), [as_label(task["name"]) for task in tasks], fontsize=8.5)
    axes.invert_yaxis()
    axes.set_xlim(0, MOST_SHOWN)
    axes.xaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axes.set_xlabel("edited / unedited, 95 % intervals")
    axes.grid(alpha=0.25, axis="x")
    axes.set_title(as_label(title), fontsize=10)
    shown = [Patch(color=colour(number), label=as_label(group)) for number, group in enumerate(groups)]
    figure.legend(handles=shown, fontsize=8, loc="outside right upper")
    return figure
