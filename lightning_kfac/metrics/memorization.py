"""Memorization: does the model recite the sequences it saw in training?"""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_kfac.metrics.functional import recitation


class Memorization(Metric):
    """Strict and loose accuracy and mean normalised Levenshtein distance of greedy continuations.

    Example:
        >>> metric = Memorization()
        >>> metric.update([[1, 2, 3, 9], [5, 6]], [[1, 2, 3, 4], [5, 6]])
        >>> {name: value.item() for name, value in metric.compute().items()}
        {'strict_acc': 0.5, 'loose_acc': 1.0, 'avg_levenshtein_norm': 0.125, 'n_sequences': 2}
    """

    full_state_update = False
    higher_is_better = False

    def __init__(self, end_of_text: Collection[int] = frozenset(), **kwargs):
        super().__init__(**kwargs)
        self.end_of_text = frozenset(end_of_text)
        for name in ("strict", "loose", "count"):
            self.add_state(name, torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("levenshtein", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, continuations: Sequence[Sequence[int]], golds: Sequence[Sequence[int]]) -> None:
        """Adds one continuation and one gold suffix per sequence."""
        for continuation, gold in zip(continuations, golds, strict=True):
            verdict = recitation(continuation, gold, self.end_of_text)
            self.strict += verdict.strict
            self.loose += verdict.loose
            self.levenshtein += verdict.levenshtein_norm
            self.count += 1

    def compute(self) -> dict[str, Tensor]:
        """Rates in [0, 1] (float64; NaN before any update) and the number of sequences."""
        return {
            "strict_acc": self.strict.double() / self.count,
            "loose_acc": self.loose.double() / self.count,
            "avg_levenshtein_norm": self.levenshtein / self.count,
            "n_sequences": self.count,
        }
