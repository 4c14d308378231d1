"""What edits will cost, over the share that they keep."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from lightning_kfac.editing.report import edit_label
from lightning_kfac.reporting.escape import as_label
from lightning_kfac.reporting.figures.style import colour, marker, new_figure


def price_figure(records: Sequence[Mapping[str, Any]], text: str) -> Figure:
    """The predicted change of the loss by every edit, a line a formula; diagonal form dashed, measured values crosses.

    Args:
        records: As ``forecast.json`` has them.
        text: What they are for.
    """
    figure = new_figure(8, 4.6)
    axes = figure.add_subplot()
    kinds = dict.fromkeys(edit_label(record["edit"]) for record in records)
    for number, kind in enumerate(kinds):
        own = sorted((r for r in records if edit_label(r["edit"]) == kind), key=lambda r: r["edit"]["rho"])
        rhos = [record["edit"]["rho"] for record in own]
        totals = [record["predicted"]["total"] for record in own]
        diagonal = [record["diagonal"] for record in own]
        label = as_label(kind)
        axes.plot(rhos, totals, color=colour(number), marker=marker(number), label=f"{label}: predicted")
        axes.plot(rhos, diagonal, color=colour(number), linestyle="--", linewidth=1, label=f"{label}: diagonal form")
        measured = [(r["edit"]["rho"], r["measured"]) for r in own if "measured" in r]
        if measured:
            axes.scatter(*zip(*measured, strict=True), color=colour(number), marker="x", label=f"{label}: measured")
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.set_xlabel("rho: share of the importance that is kept (not comparable between formulas)")
    axes.set_ylabel("change of the loss, nats a token")
    axes.set_title(f"What edits will cost on {as_label(text)}", fontsize=10)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def price_curve_figure(prices: Mapping[str, Mapping[float, float]]) -> Figure:
    """The diagonal form over rho, a line a formula.

    Args:
        prices: Nats a token by formula and rho.
    """
    figure = new_figure(7, 4.2)
    axes = figure.add_subplot()
    for number, (formula, of_rho) in enumerate(prices.items()):
        line = sorted(of_rho.items())
        axes.plot(*zip(*line, strict=True), color=colour(number), marker=marker(number), label=as_label(formula))
    axes.set_xlabel("rho: share of the importance that is kept (not comparable between formulas)")
    axes.set_ylabel("change of the loss, nats a token")
    axes.set_title("What an edit costs to second order, by what was collected", fontsize=10)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8)
    return figure
