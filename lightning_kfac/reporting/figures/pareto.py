"""What each edit of a sweep costs, and what it suppresses."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from lightning_kfac.editing.formulas import FORMULAS
from lightning_kfac.editing.report import edit_label, edit_place
from lightning_kfac.editing.sweep import pareto_front
from lightning_kfac.reporting.figures.style import COLOURS, MARKERS, new_figure


def pareto_figure(rows: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """Strict accuracy against perplexity of every edit, one line a formula, with the Pareto front.

    Args:
        rows: Results of a sweep; one without ``edit`` is the unedited model.
        title: What was edited, and measured on what.
    """
    figure = new_figure(8, 5.2)
    axes = figure.add_subplot()
    kinds: dict[str, list[tuple[float, float]]] = {}
    several = len({edit_place(row["edit"]) for row in rows if row["edit"]}) > 1
    for row in rows:
        if row["edit"] and row.get("perplexity") is not None and row.get("strict_acc") is not None:
            label = edit_label(row["edit"]) + (f", {edit_place(row['edit'])}" if several else "")
            kinds.setdefault(label, []).append((row["strict_acc"], row["perplexity"]))
    order = {formula: number for number, formula in enumerate(FORMULAS)}
    for number, (label, points) in enumerate(
        sorted(kinds.items(), key=lambda kind: order[kind[0].split()[0].rstrip(",")])
    ):
        x, y = zip(*sorted(points), strict=True)
        style = {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}
        axes.plot(x, y, label=label, linewidth=1, markersize=4.5, alpha=0.85, **style)
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
    axes.set_title(title, fontsize=11)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return figure
