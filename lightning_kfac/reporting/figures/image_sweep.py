"""What each edit of an image classifier suppresses, and what it keeps."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from lightning_kfac.editing.formulas import FORMULAS
from lightning_kfac.editing.report import edit_label
from lightning_kfac.reporting.escape import as_label
from lightning_kfac.reporting.figures.style import colour, marker, new_figure

PANELS = {"val_acc": "validation accuracy", "true_label_acc": "wrong-labelled images given their true label"}


def image_sweep_figure(rows: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """Validation accuracy, and recovered true labels, over the share of wrong labels that is still given.

    Args:
        rows: Results of a sweep; one without ``edit`` is the unedited model.
        title: What was edited.
    """
    figure = new_figure(10, 4.6)
    order = list(FORMULAS)
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for row in sorted((row for row in rows if row["edit"]), key=lambda row: order.index(row["edit"]["formula"])):
        kinds.setdefault(edit_label(row["edit"]), []).append(row)
    for axes, (key, name) in zip(figure.subplots(1, len(PANELS)), PANELS.items(), strict=True):
        for number, (label, points) in enumerate(kinds.items()):
            places = sorted((row["wrong_label_acc"], row[key]) for row in points)
            how = {"color": colour(number), "marker": marker(number), "linewidth": 1, "markersize": 4.5}
            axes.plot(*zip(*places, strict=True), label=as_label(label), **how)
        for row in rows:
            if row["edit"] is None:
                how = {"color": "black", "marker": "*", "linestyle": "none", "markersize": 11}
                axes.plot([row["wrong_label_acc"]], [row[key]], label="unedited", **how)
        axes.set_xlim(-0.03, 1.03)
        axes.set_ylim(-0.03, 1.03)
        axes.set_xlabel("wrong-labelled images given their wrong label")
        axes.set_ylabel(name)
        axes.grid(alpha=0.25)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=5)
    figure.suptitle(as_label(title), fontsize=11)
    return figure
