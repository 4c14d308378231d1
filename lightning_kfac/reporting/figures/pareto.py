"""What each edit of a sweep costs, and what it suppresses."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_kfac.editing.formulas import FORMULAS
from lightning_kfac.editing.report import edit_label, edit_place
from lightning_kfac.editing.sweep import pareto_front
from lightning_kfac.reporting.escape import as_label
from lightning_kfac.reporting.figures.style import GREY, INK, colour, marker, new_figure

MOST_LABELS = 30


def pareto_figure(
    rows: Sequence[Mapping[str, Any]], title: str, links: Mapping[int, str] | None = None, width: float = 8
) -> Figure:
    """Strict accuracy against perplexity of every edit, one line a formula, with the Pareto front.

    Each point has its rho (of many points, those of the front), the unedited model is a star, and an arrow points to
    where an edit would be better.

    Args:
        rows: Results of a sweep; one without ``edit`` is the unedited model.
        title: What was edited, and measured on what.
        links: In a page, what the point of each row leads to.
        width: In inches.
    """
    figure = new_figure(width, 5.2)
    axes = figure.add_subplot()
    edits = [row for row in rows if row["edit"]]
    best = [edits[i] for i in pareto_front(edits)]
    _draw_kinds(axes, rows, best, links or {})
    front = sorted((row["strict_acc"], row["perplexity"]) for row in best)
    if front:
        axes.step(*zip(*front, strict=True), where="post", color=INK, linestyle=":", label="Pareto front")
    for row in rows:
        if row["edit"] is None and row.get("perplexity") is not None:
            axes.axhline(row["perplexity"], color=GREY, linewidth=0.8, linestyle="--")
            if row.get("strict_acc") is not None:
                place = row["strict_acc"], row["perplexity"]
                axes.plot(*place, "*", color=INK, markersize=11, linestyle="", label="unedited")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_minor_formatter("{x:,.0f}")
    axes.set_xlim(-0.03, 1.03)
    axes.set_xlabel("strict accuracy: share of the memorized sequences recited word for word")
    axes.set_ylabel("perplexity on held-out text (log scale)")
    axes.set_title(as_label(title), fontsize=11)
    axes.grid(alpha=0.25)
    axes.margins(y=0.12)
    axes.annotate(
        "better",
        xy=(0.52, 0.42),
        xytext=(0.63, 0.56),
        xycoords="axes fraction",
        fontsize=9,
        arrowprops={"arrowstyle": "->", "color": INK},
    )
    if axes.get_legend_handles_labels()[0]:  # else nothing was measured on held-out text
        figure.legend(fontsize=8, loc="outside lower center", ncols=2)
    return figure


def _draw_kinds(
    axes: Axes, rows: Sequence[Mapping[str, Any]], best: Sequence[Mapping[str, Any]], links: Mapping[int, str]
) -> None:
    """A line for each kind of edit, in the order of the formulas."""
    several = len({edit_place(row["edit"]) for row in rows if row["edit"]}) > 1
    points: dict[str, list[tuple[float, float, float, str, bool]]] = {}
    formulas: dict[str, str] = {}
    for number, row in enumerate(rows):
        edit = row["edit"]
        if edit and row.get("perplexity") is not None and row.get("strict_acc") is not None:
            label = edit_label(edit) + (f", {edit_place(edit)}" if several else "")
            point = row["strict_acc"], row["perplexity"], edit["rho"], links.get(number, ""), row in best
            points.setdefault(label, []).append(point)
            formulas[label] = edit["formula"]
    order = list(FORMULAS)
    few = sum(map(len, points.values())) <= MOST_LABELS
    for number, label in enumerate(sorted(points, key=lambda label: order.index(formulas[label]))):
        of_kind = sorted(points[label], key=lambda point: point[2])
        x, y, rhos, urls, front = zip(*of_kind, strict=True)
        axes.plot(x, y, color=colour(number), linewidth=1, alpha=0.6)
        drawn = axes.scatter(x, y, 26, color=colour(number), marker=marker(number), label=as_label(label), zorder=3)
        if any(urls):
            drawn.set_urls([url or None for url in urls])
        for place, rho, is_best in zip(zip(x, y, strict=True), rhos, front, strict=True):
            if few or is_best:
                axes.annotate(f"{rho:g}", place, (4, 4), textcoords="offset points", fontsize=7)
