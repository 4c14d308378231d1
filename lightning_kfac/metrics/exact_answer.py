"""ExactAnswer: how many questions does the model answer right?"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from lightning_kfac.math.statistics import Figure
from lightning_kfac.metrics.described import AnswersSeen, Label
from lightning_kfac.metrics.per_sequence import SeveralFigures


class ExactAnswer(SeveralFigures):
    """Share of answers that equal the right one, letter by letter.

    Example:
        >>> metric = ExactAnswer()
        >>> metric.update(["19", "7"], ["19", "8"])
        >>> {name: value.item() for name, value in metric.compute().items()}
        {'exact_acc': 0.5, 'n_questions': 2}
    """

    labels: ClassVar[dict[str, Label]] = {
        "exact_acc": Label("answers right", "{:.3f}", "higher", short="answers right", panel="rates")
    }
    group = "questions"
    seen = AnswersSeen
    higher_is_better = True
    columns = ("right",)
    counted = "n_questions"

    @override
    def observe(self, seen: AnswersSeen) -> None:
        self.update(seen.answers, seen.golds, seen.index)

    @override
    def update(self, answers: Sequence[str], golds: Sequence[str], index: Sequence[int] | None = None) -> None:
        """Adds one given and one right answer per question, and the numbers of the questions."""
        right = [[float(answer == gold)] for answer, gold in zip(answers, golds, strict=True)]
        self.add(torch.tensor(right, dtype=torch.float64).view(-1, 1), index)

    @override
    def figures_of(self, values: dict[str, Tensor]) -> dict[str, Figure]:
        return {"exact_acc": Figure(values["right"], torch.ones_like(values["right"]), rate=True)}
