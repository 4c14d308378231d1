"""WrongLabels and ValidationImages: does a classifier know wrong labels by heart, and what else does it know?"""

from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from lightning_kfac.math.statistics import Figure
from lightning_kfac.metrics.described import ImagesSeen, Label
from lightning_kfac.metrics.per_sequence import SeveralFigures


class WrongLabels(SeveralFigures):
    """Of images that were trained with a wrong label: the share that is given this label, and the true one.

    Example:
        >>> metric = WrongLabels()
        >>> metric.update(torch.tensor([3, 5]), torch.tensor([3, 3]), torch.tensor([8, 5]))
        >>> {name: value.item() for name, value in metric.compute().items()}
        {'wrong_label_acc': 0.5, 'true_label_acc': 0.5, 'n_wrong': 2}
    """

    labels: ClassVar[dict[str, Label]] = {
        "wrong_label_acc": Label("given their wrong label", "{:.3f}", "lower", short="wrong label", panel="rates"),
        "true_label_acc": Label("given their true label", "{:.3f}", "higher", short="true label", panel="rates"),
    }
    group = "images"
    seen = ImagesSeen
    higher_is_better = False
    columns = ("wrong", "true")
    counted = "n_wrong"

    @override
    def observe(self, seen: ImagesSeen) -> None:
        self.update(seen.predicted, seen.labels, seen.true, seen.index)

    @override
    def update(self, predicted: Tensor, labels: Tensor, true: Tensor, index: Any = None) -> None:
        """Adds predicted, wrong and true classes, int64 [n], and the numbers of the images."""
        self.add(torch.stack([predicted == labels, predicted == true], 1), index)

    @override
    def figures_of(self, values: dict[str, Tensor]) -> dict[str, Figure]:
        ones = torch.ones_like(values["wrong"])
        return {f"{name}_label_acc": Figure(values[name], ones, rate=True) for name in self.columns}


class ValidationImages(SeveralFigures):
    """Share of images that the model never saw which it classifies right."""

    labels: ClassVar[dict[str, Label]] = {
        "val_acc": Label("validation accuracy", "{:.3f}", "higher", short="validation", panel="rates")
    }
    group = "images"
    seen = ImagesSeen
    higher_is_better = True
    columns = ("right",)
    counted = "n_validation"

    @override
    def observe(self, seen: ImagesSeen) -> None:
        self.update(seen.predicted, seen.true, seen.index)

    @override
    def update(self, predicted: Tensor, true: Tensor, index: Any = None) -> None:
        """Adds predicted and true classes, int64 [n], and the numbers of the images."""
        self.add((predicted == true)[:, None], index)

    @override
    def figures_of(self, values: dict[str, Tensor]) -> dict[str, Figure]:
        return {"val_acc": Figure(values["right"], torch.ones_like(values["right"]), rate=True)}
