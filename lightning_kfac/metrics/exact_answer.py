"""ExactAnswer: how many questions does the model answer right?"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric


class ExactAnswer(Metric):
    """Share of answers that equal the right one, letter by letter.

    Example:
        >>> metric = ExactAnswer()
        >>> metric.update(["19", "7"], ["19", "8"])
        >>> {name: value.item() for name, value in metric.compute().items()}
        {'exact_acc': 0.5, 'n_questions': 2}
    """

    full_state_update = False
    higher_is_better = True

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        for name in ("right", "count"):
            self.add_state(name, torch.tensor(0), dist_reduce_fx="sum")

    def update(self, answers: Sequence[str], golds: Sequence[str]) -> None:
        """Adds one given and one right answer per question."""
        for answer, gold in zip(answers, golds, strict=True):
            self.right += answer == gold
            self.count += 1

    def compute(self) -> dict[str, Tensor]:
        """The rate in [0, 1] (float64; NaN before any update) and the number of questions."""
        return {"exact_acc": self.right.double() / self.count, "n_questions": self.count}
