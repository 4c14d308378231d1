"""What each edit of a sweep costs, and what it suppresses."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_kfac.editing.formulas import FORMULAS
from lightning_kfac.editing.report import edit_label, edit_place
from lightning_kfac.editing.sweep import pareto_front
from lightning_kfac.reporting.escape import as_label
from lightning_kfac.reporting.figures.style import colour, marker, new_figure


def pareto_figure(rows: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """Strict accuracy against perplexity of every edit, one line a formula, with the Pareto front.

    Args:
        rows: Results of a sweep; one without ``edit`` is the unedited model.
        title: What was edited, and measured on what.
    """
    figure = new_figure(8, 5.2)
    axes = figure.add_subplot()
    _draw_kinds(axes, rows)
    edits = [row for row in rows if row["edit"]]
    front = sorted((edits[i]["strict_acc"], edits[i]["perplexity"]) for i in pareto_front(edits))
    if front:
        axes.step(*zip(*front, strict=True), where="post", color="black", linestyle=":", label="Pareto front")
    for row in rows:
        if row["edit"] is None and row.get("perplexity") is not None:
            axes.axhline(row["perplexity"], color="grey", linewidth=0.8, linestyle="--", label="unedited perplexity")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_minor_formatter("{x:,.0f}")
    axes.set_xlim(-0.03, 1.03)
    axes.set_xlabel("strict accuracy: share of the memorized sequences recited word for word")
    axes.set_ylabel("perplexity on held-out text (log scale)")
    axes.set_title(as_label(title), fontsize=11)
    axes.grid(alpha=0.25)
    if axes.get_legend_handles_labels()[0]:  # else nothing was measured on held-out text
        axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def _draw_kinds(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """A line for each kind of edit, in the order of the formulas."""
    several = len({edit_place(row["edit"]) for row in rows if row["edit"]}) > 1
    points: dict[str, list[tuple[float, float]]] = {}
    formulas: dict[str, str] = {}
    for row in rows:
        edit = row["edit"]
        if edit and row.get("perplexity") is not None and row.get("strict_acc") is not None:
            label = edit_label(edit) + (f", {edit_place(edit)}" if several else "")
            points.setdefault(label, []).append((row["strict_acc"], row["perplexity"]))
            formulas[label] = edit["formula"]
    order = list(FORMULAS)
    for number, label in enumerate(sorted(points, key=lambda label: order.index(formulas[label]))):
        x, y = zip(*sorted(points[label]), strict=True)
        axes.plot(
            x,
            y,
            label=as_label(label),
            color=colour(number),
            marker=marker(number),
            linewidth=1,
            markersize=4.5,
            alpha=0.85,
        )
